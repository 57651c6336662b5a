"""The masked layers of a CNN: convolution, batch norm and max pooling at the active sites of a mask.

The unit of the network is `masked_conv_norm`; `masked_conv2d` and `masked_batch_norm` are the same unit with a part
left out. Each function below checks its arguments once, puts them into a `Layer` and hands that to a backend: `dense`
(plain PyTorch), `cpu` (rows of active sites) or `triton` (maps in place). The stage's sites say which storage, and so
which backend, `masked_storage` has chosen.
"""

from torch import Tensor

from rcmstr_fast.ops import checks, native, triton_backend
from rcmstr_fast.ops.dispatch import operation, register, register_triton
from rcmstr_fast.ops.masked import cpu, dense, layers, tile_choice, triton
from rcmstr_fast.ops.masked.cpu import RowSites
from rcmstr_fast.ops.masked.layers import CastWeight, Layer, Norm, OneOrPair, Pair, Sites, StoredSites, Window, values
from rcmstr_fast.ops.masked.sites import active_sites as active_sites
from rcmstr_fast.ops.masked.storage import LAYERS
from rcmstr_fast.ops.masked.storage import masked_storage as masked_storage
from rcmstr_fast.ops.masked.storage import unpack_sites as unpack_sites

TILES = (tile_choice.ROWS, tile_choice.WEIGHT)
_OPERATIONS = {name: operation(name, dense.masked_layer) for name in LAYERS}
for _operation in _OPERATIONS.values():
    register_triton(
        _operation,
        triton.masked_layer,
        triton.reasons,
        lambda layer: triton_backend.avoid_on_cpu() or layers.avoid(layer, "triton"),
    )
    register(
        _operation,
        "cpp",
        cpu.masked_layer,
        unsupported_reasons=cpu.reasons,
        available=native.reasons,
        avoid=lambda layer: layers.avoid(layer, "cpp"),
    )


def _run(name: str, layer: Layer, backend: str | None) -> Tensor:
    """Run a layer on the backend of its stage's storage, else on the one that the general dispatch finds.

    `masked_storage` has asked already what speaks against the backend of a stage that it keeps. What remains to be
    asked of each layer is whether that backend can compute it.
    """
    sites = layer.sites
    if backend is None and isinstance(sites, StoredSites) and sites.kept:
        chosen = _OPERATIONS[name].backends[sites.backend]
        if not chosen.unsupported_reasons(layer):
            return chosen.run(layer)
    return _OPERATIONS[name](layer, backend=backend)


def masked_conv_norm(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: OneOrPair = 1,
    padding: OneOrPair = 0,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """masked_batch_norm(masked_conv2d(x, weight, sites), norm_weight, norm_bias, sites), the unit of the network.

    As one operation a backend can take the statistics while the convolution still holds its results.

    Args:
        x: as of `masked_conv2d`.
        weight: as of `masked_conv2d`.
        sites: as of `masked_conv2d`.
        norm_weight: [O] floating point.
        norm_bias: [O] floating point.
        stride: rows and columns.
        padding: rows and columns, zeros.
        eps: above 0; added to the variance.
        residual: like the result; added before ReLU, ignored at inactive sites.
        relu: apply ReLU.
        group_size: images that share statistics, as of `masked_batch_norm`; None: all.
        backend: None (automatic), "reference", "cpp" or "triton".
    Returns:
        [B, O, h, w] in the dtype that `conv2d` gives (autocast applies), zero at inactive sites; rows [N, O] at packed
        stages.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, eps or group_size not above 0.
    """
    name = "masked_conv_norm"
    window, size = _check_convolution(name, x, weight, sites, stride, padding)
    layer = Layer(x, sites, window, weight, Norm(norm_weight, norm_bias, eps, residual, relu, group_size))
    _check_norm(name, layer, values(weight).shape[0], size)
    return _run(name, layer, backend)


def masked_conv2d(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    *,
    stride: OneOrPair = 1,
    padding: OneOrPair = 0,
    backend: str | None = None,
) -> Tensor:
    """Convolution without bias whose inactive inputs count as zero and whose inactive outputs are zero.

    With nothing hidden it is `torch.nn.functional.conv2d`. What inactive inputs hold (also NaN) reaches neither the
    output nor a gradient; the gradient of inactive inputs is zero.

    Args:
        x: [B, C, h0, w0] floating point, or rows [N, C] with sites of `masked_storage`.
        weight: [O, C, kh, kw] floating point; under autocast also a `CastWeight`.
        sites: maps of the output's stage; `active` [B, 1, h, w]. Where the input's size differs from it,
            `source` [B, 1, h0, w0] is the input's map.
        stride: rows and columns.
        padding: rows and columns, zeros.
        backend: None (automatic), "reference", "cpp" or "triton".
    Returns:
        [B, O, h, w] in the dtype that `conv2d` gives (autocast applies); rows [N, O] at packed stages.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree.
    """
    name = "masked_conv2d"
    window, _ = _check_convolution(name, x, weight, sites, stride, padding)
    return _run(name, Layer(x, sites, window, weight), backend)


def masked_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: Sites,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise with batch statistics of the active sites, add a residual, apply ReLU; zero at inactive sites.

    y = (x - mean) / sqrt(var + eps) * weight + bias (+ residual), where mean and biased variance are those of a channel
    over the active sites of each group of images. There are no running statistics. A group without active sites gives
    zeros and zero gradients; one with a single site gives `bias` (+ residual).

    Args:
        x: [B, C, h, w] floating point; inactive sites may hold anything, also NaN. Or rows [N, C] with sites of
            `masked_storage`.
        weight: [C] floating point.
        bias: [C] floating point.
        sites: `active` [B, 1, h, w].
        eps: above 0; added to the variance.
        residual: like x; added before ReLU, ignored at inactive sites.
        relu: apply ReLU.
        group_size: images that share statistics, consecutive; None: all. The rest of the batch is a group of its own,
            but a rest of one image joins the group before it (as in `models.batch_norm`).
        backend: None (automatic), "reference", "cpp" or "triton".
    Returns:
        [B, C, h, w] in the dtype of x, rows [N, C] at packed stages; arithmetic in float32 (float64 for float64 x).
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, eps or group_size not above 0.
    """
    name = "masked_batch_norm"
    size = _check_input(name, x, sites, None)
    layer = Layer(x, sites, norm=Norm(weight, bias, eps, residual, relu, group_size))
    _check_norm(name, layer, x.shape[1], size)
    return _run(name, layer, backend)


def masked_max_pool2d(
    x: Tensor,
    sites: Sites,
    *,
    kernel_size: OneOrPair,
    stride: OneOrPair,
    padding: OneOrPair = 0,
    backend: str | None = None,
) -> Tensor:
    """Maximum over the active sites of each window; windows without any and inactive outputs are zero.

    Args:
        x: [B, C, h0, w0] floating point; inactive sites may hold anything, also NaN. Or rows [N, C] with sites of
            `masked_storage`.
        sites: maps of the output's stage; `source` [B, 1, h0, w0] is the input's map where the size differs.
        kernel_size: rows and columns.
        stride: rows and columns.
        padding: rows and columns, at most half the kernel; ignored like inactive sites.
        backend: None (automatic), "reference", "cpp" or "triton".
    Returns:
        [B, C, h, w] in the dtype of x; rows [N, C] at packed stages.
    Raises:
        TypeError: x is not floating point.
        ValueError: shapes or devices disagree, padding above half the kernel.
    """
    name = "masked_max_pool2d"
    window = _window(name, kernel_size, stride, padding)
    if any(2 * p > k for p, k in zip(window.padding, window.kernel)):
        raise ValueError(f"{name}: padding must be at most half of {kernel_size}, got {padding}")
    _check_input(name, x, sites, window)
    return _run(name, Layer(x, sites, window), backend)


def _pair(value: OneOrPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _window(op: str, kernel: OneOrPair, stride: OneOrPair, padding: OneOrPair) -> Window:
    window = Window(_pair(kernel), _pair(stride), _pair(padding))
    if min(*window.kernel, *window.stride) < 1 or min(window.padding) < 0:
        raise ValueError(
            f"{op}: kernel and stride must be 1 or more and padding 0 or more, got {kernel}, {stride}, {padding}"
        )
    return window


def _check_input(op: str, x: Tensor, sites: Sites, window: Window | None) -> Pair:
    """Check that x and the maps of its stage fit the window; the size of the result's map."""
    if x.dim() == 2 and isinstance(sites, RowSites):
        checks.check_tensor(op, "x", x, (sites.inputs(x, window).count, "C"), like="the active sites")
        return sites.rows.size
    checks.check_tensor(op, "x", x, ("B", "C", "h", "w"))
    mine = (x.shape[2], x.shape[3])
    out = mine if window is None else window.output_size(mine)
    if window is not None and min(out) < 1:
        raise ValueError(f"{op}: x must be at least as large as the kernel {window.kernel}, got {list(x.shape)}")
    like = "x" if window is None else "the output"
    checks.check_tensor(op, "sites.active", sites.active, (x.shape[0], 1, *out), "bool", like=like)
    if mine != out:
        checks.check_tensor(op, "sites.source", sites.source, (x.shape[0], 1, *mine), "bool", like="x")
    if window is not None:
        checks.check_devices(op, **{"x": x, "sites.active": sites.active, "sites.source": sites.source})
    return out


def _check_convolution(
    op: str, x: Tensor, weight: Tensor | CastWeight, sites: Sites, stride: OneOrPair, padding: OneOrPair
) -> tuple[Window, Pair]:
    """Check that the arguments of a convolution fit each other; its window and the size of its result."""
    kernel = values(weight)
    checks.check_tensor(op, "weight", kernel, ("O", "C", "kh", "kw"))
    window = _window(op, (kernel.shape[2], kernel.shape[3]), stride, padding)
    size = _check_input(op, x, sites, window)
    checks.check_tensor(op, "weight", kernel, ("O", x.shape[1], "kh", "kw"), like="x")
    checks.check_devices(op, x=x, weight=kernel)
    return window, size


def _check_norm(op: str, layer: Layer, channels: int, size: Pair) -> None:
    """Check the norm of a layer whose result has `channels` channels and the size `size`."""
    x, sites, window, _, norm = layer
    assert norm is not None
    prefix, of, result = (
        ("", "the channels of x", "x") if window is None else ("norm_", "the outputs of weight", "the result")
    )
    named = {f"{prefix}weight": norm.weight, f"{prefix}bias": norm.bias}
    for name, tensor in named.items():
        checks.check_tensor(op, name, tensor, (channels,), like=of)
    checks.check_devices(op, **{"x": x, **named, "sites.active": sites.active, "residual": norm.residual})
    checks.check_positive(op, eps=norm.eps)
    if norm.group_size is not None:
        checks.check_positive(op, group_size=norm.group_size)
    if norm.residual is None:
        return
    shape: tuple[int, ...] = (sites.active.shape[0], channels, *size)
    if norm.residual.dim() == 2 and isinstance(sites, RowSites):
        shape = (sites.rows.count, channels)
    checks.check_tensor(op, "residual", norm.residual, shape, like=result)
