"""What every encoder offers, whatever its architecture."""

from torch import Tensor, nn

from rcmstr_fast.ops import Masks


class Encoder(nn.Module):
    """Turns word images into a sequence of frames, from the whole image or from its visible part.

    Attributes:
        out_channels: C of the frames.
        checkpointing: keep only the inputs of each stage or block and compute the rest again in backward.
    """

    out_channels: int
    checkpointing: bool = False

    def mask_unit(self, wanted: str) -> str:
        """The unit in which `ops.draw_masks` hides this encoder's input."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """images `[B, 3, H, W]`, normalised, to frames `[B, T, C]`."""
        raise NotImplementedError

    def forward_masked(self, images: Tensor, masks: Masks, rule: str) -> tuple[Tensor, Tensor | None]:
        """The pass of masked image modelling; no hidden pixel reaches its result.

        Args:
            images: `[B, 3, H, W]`, normalised; hidden pixels may hold anything, NaN too.
            masks: of `ops.draw_masks` in this encoder's unit; True means hidden.
            rule: `anchored` or `any`: how a CNN carries the mask across its 25 -> 26 column pool.
        Returns:
            features: `[B, n, C]`, frames (CNN) or tokens (ViT).
            active: `[B, n]` bool, the frames that saw a visible pixel; None where every feature is defined.
        """
        raise NotImplementedError

    def masked_frames(self, features: Tensor) -> Tensor:
        """features of `forward_masked` to frames `[B, T, C]` (zero at frames that saw nothing, CNN)."""
        raise NotImplementedError


def check_images(images: Tensor, height: int, width: int | None = None) -> None:
    """Raise ValueError unless images are `[B, 3, height, width]` (any width where None)."""
    fits = images.dim() == 4 and tuple(images.shape[1:3]) == (3, height)
    if not fits or (width is not None and images.shape[3] != width):
        raise ValueError(f"images must be [B, 3, {height}, {width or 'W'}], got {list(images.shape)}")
