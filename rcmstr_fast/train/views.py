"""The views that a method wants, out of decoded images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods.protocol import ViewSpec
from rcmstr_fast.ops.augment_views import augment_views

#: Makes views: the arguments and the result of `ops.augment_views`.
Make = Callable[..., Tensor]
_U64 = (1 << 64) - 1


@dataclass
class _Group:
    """Views that one call makes: those of one preset.

    Attributes:
        specs: in the order of their random streams; one that is also wanted permuted comes first.
        permuted: the spec of the permuted copy of the first, or None.
    """

    specs: list[ViewSpec]
    permuted: ViewSpec | None = None


class ViewMaker:
    """Makes the views of a method; the same for a loader's thread and for a GPU.

    Args:
        specs: of the method.
        config: resolved.
    Raises:
        ValueError: two views have one name, or a permuted view is of one that cannot be permuted.
    """

    def __init__(self, specs: tuple[ViewSpec, ...], config: PretrainConfig) -> None:
        self.specs, self.config = specs, config
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError(f"views must have different names, got {[spec.name for spec in specs]}")
        self._groups: list[_Group] = []
        for spec in specs:
            if spec.permuted_of is None:
                self._add(spec)
        for spec in specs:
            if spec.permuted_of is not None:
                self._permute(spec)

    def check_dali(self) -> None:
        """Raise ConfigError where DALI's fixed chain cannot make the views."""
        presets = [group.specs[0].preset for group in self._groups]
        if presets != ["pretrain"]:
            raise ConfigError(
                f"data.augment must be fused for method {self.config.method.name}, whose views have the presets "
                f"{', '.join(map(str, presets))}, got dali"
            )

    @property
    def calls(self) -> int:
        """Largest number of views that one call makes."""
        return max(len(group.specs) for group in self._groups)

    def __call__(
        self,
        images: Tensor,
        index: Tensor,
        epoch: int,
        order: Tensor | None,
        dtype: torch.dtype,
        make: Make | None = None,
    ) -> dict[str, Tensor]:
        """The views of a batch.

        Args:
            images: [B, H, W, 3] uint8 on the device of the views.
            index: [B] int64 slots.
            epoch: 0-based.
            order: [B, N] int64 on that device: `drawn["order"]`.
            dtype: float32 or bfloat16.
            make: instead of `ops.augment_views`.
        Returns:
            name -> [B, 3, h, w], in the order of the specs.
        """
        found: dict[str, Tensor] = {}
        for number, group in enumerate(self._groups):
            made = (make or augment_views)(
                images,
                seed=(self.config.seed + (number << 32)) & _U64,
                epoch=epoch,
                index=index,
                num_views=len(group.specs),
                size=(images.shape[1], images.shape[2]),
                preset=group.specs[0].preset,
                order=order if group.permuted else None,
                dtype=dtype,
            )
            wanted = [*group.specs, *([group.permuted] if group.permuted else [])]
            found |= {spec.name: _sized(view, spec.size) for spec, view in zip(wanted, made, strict=True)}
        return {spec.name: found[spec.name] for spec in self.specs}

    def _add(self, spec: ViewSpec) -> None:
        for group in self._groups:
            if group.specs[0].preset == spec.preset:
                group.specs.append(spec)
                return
        self._groups.append(_Group([spec]))

    def _permute(self, spec: ViewSpec) -> None:
        for group in self._groups:
            for source in group.specs:
                if source.name == spec.permuted_of and group.permuted is None and source.size == spec.size is None:
                    group.specs.remove(source)
                    group.specs.insert(0, source)
                    group.permuted = spec
                    return
        raise ValueError(f"view {spec.name} must be the one permuted copy of a whole view, got {spec.permuted_of!r}")


def _sized(view: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A view resized to (height, width); crops of a preset have been made at full size before."""
    if size is None or tuple(view.shape[-2:]) == tuple(size):
        return view
    small = F.interpolate(view.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small.to(view.dtype).contiguous(memory_format=torch.channels_last)
