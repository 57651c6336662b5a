"""What every backend of the masked layers receives: one layer with checked arguments, and the storage of its stage."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

Pair = tuple[int, int]
#: Rows and columns, or one number for both.
OneOrPair = int | Pair


class Sites(NamedTuple):
    """Active sites `active` [B, 1, h, w] bool of one stage; `source` [B, 1, h0, w0] those of the stage before it."""

    active: Tensor
    source: Tensor | None


class CastWeight(NamedTuple):
    """A weight and its one copy in the dtype of autocast; the masked convolutions take it instead of a weight.

    Attributes:
        full: [O, C, kh, kw] float32; takes the gradients that are summed in float32.
        low: the same values in the dtype of autocast; takes the gradients of the layers that know only this dtype.
    """

    full: Tensor
    low: Tensor


def values(weight: Tensor | CastWeight) -> Tensor:
    """The tensor whose shape and device are those of the weight, and which any layer can multiply with."""
    return weight.low if isinstance(weight, CastWeight) else weight


class Window(NamedTuple):
    """Where a convolution or a pool looks: rows and columns of kernel, stride and padding."""

    kernel: Pair
    stride: Pair
    padding: Pair

    def output_size(self, size: Pair) -> Pair:
        """(h, w) of the output for an input map of that size."""
        h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, self.kernel, self.stride, self.padding))
        return h, w

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def numbers(self) -> list[int]:
        """The six numbers one after the other, as kernels and custom operators take them."""
        return [*self.kernel, *self.stride, *self.padding]


class Norm(NamedTuple):
    """The batch norm of a layer; see `masked_batch_norm` for the arguments."""

    weight: Tensor
    bias: Tensor
    eps: float
    residual: Tensor | None
    relu: bool
    group_size: int | None


class Layer(NamedTuple):
    """One masked layer. The unit of the network is a convolution with its norm; the others leave a part out.

    Attributes:
        x: input, [B, C, h0, w0] or rows [N, C] of the active sites.
        sites: those of the output's stage.
        window: None: a norm alone.
        weight: of the convolution; None with a window: a max pool.
        norm: None: a convolution or a pool alone.
    """

    x: Tensor
    sites: Sites
    window: Window | None = None
    weight: Tensor | CastWeight | None = None
    norm: Norm | None = None


class StoredSites(Sites):
    """Sites of a stage and how the layers over it store their maps, as `masked_storage` has chosen.

    There are two storages: rows of the active sites on a CPU (`rows.RowSites`), and maps in place with lists of the
    active sites on a GPU (`lists.ListSites`). Plain `Sites` stand for dense maps.

    Attributes:
        backend: the backend whose storage it is.
        kept: whether results stay in this storage from layer to layer. Otherwise it serves one layer, which takes and
            gives dense maps.
    """

    backend: ClassVar[str]
    kept: bool

    @classmethod
    def make(cls, sites: Sites, kept: bool) -> Self:
        """Store the stage of `sites`."""
        made = cls(*sites)
        made.kept = kept
        return made

    @classmethod
    def of(cls, sites: Sites) -> Self:
        """`sites` if they are in this storage, else this storage for one layer."""
        return sites if isinstance(sites, cls) else cls.make(sites, False)

    def take_in(self, x: Tensor, window: Window | None) -> Tensor:
        """The input x of a layer, however it is stored, as the layers of this storage read it."""
        raise NotImplementedError

    def give_out(self, x: Tensor) -> Tensor:
        """The result x of a layer of this storage as a dense map, zero at inactive sites."""
        raise NotImplementedError

    def as_map(self, x: Tensor, window: Window | None) -> Tensor:
        """The input x of a layer, however it is stored, as a map [B, C, h0, w0]; inactive sites may hold anything."""
        raise NotImplementedError

    def of_window(self, x: Tensor, window: Window) -> Any:
        """Which inputs meet which outputs of a window over x, listed as this storage's layers read it; made once."""
        raise NotImplementedError


def over_maps(layer: Layer) -> Layer:
    """The same layer with maps for the rows that a packed stage has given it."""
    sites, norm = layer.sites, layer.norm
    if not isinstance(sites, StoredSites):
        return layer
    if norm is not None and norm.residual is not None:
        norm = norm._replace(residual=sites.as_map(norm.residual, None))
    return layer._replace(x=sites.as_map(layer.x, layer.window), norm=norm)


def operands(x: Tensor, weight: Tensor | CastWeight) -> tuple[Tensor, Tensor, Tensor]:
    """What a convolution with a gradient of its own works on (autocast applies as in `conv2d`).

    Returns:
        x and the weight's values without gradient, in the dtype to compute in, and the tensor that takes the weight's
        gradient.
    """
    kind = x.device.type
    full, low = weight if isinstance(weight, CastWeight) else (weight, weight)
    low = low.detach()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, low = x.to(dtype), low.to(dtype)
    return x, low, full


def avoid(layer: Layer, backend: str) -> list[str]:
    """Why the automatic choice passes over a sparse backend at a stage that `masked_storage` has not given to it.

    Converting the maps around every single layer costs more than skipping the hidden sites saves.
    """
    sites = layer.sites
    chosen = isinstance(sites, StoredSites) and sites.kept and sites.backend == backend
    return [] if chosen else ["masked_storage did not choose it for this stage"]
