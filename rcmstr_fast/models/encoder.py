"""What every encoder offers, whatever its architecture."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of
from rcmstr_fast.models.recurrent import bilstm_stack
from rcmstr_fast.ops.draw_masks import Masks


class Features(NamedTuple):
    """What an encoder makes of images, before anything is averaged or put into sequence.

    Attributes:
        tokens: `[B, N, C]`: the patches row by row (ViT), or the visual frames V (CNN).
        class_token: `[B, C]`, the encoder's own token; None where it has none.
        active: `[B, N]` bool, the tokens that saw a visible pixel; None where every token is defined.
    """

    tokens: Tensor
    class_token: Tensor | None = None
    active: Tensor | None = None


class Encoder(nn.Module):
    """Turns word images into tokens and a sequence of frames, from the whole image or from its visible part.

    A subclass gives `features` and `columns`; `forward(images)` are the frames. With `sequence`, two bidirectional
    LSTM layers follow the columns (SeqCLR's contextual features H beside the visual ones V): they are part of the
    encoder, so they are pretrained, exported and frozen with it.

    Attributes:
        out_channels: C of the frames.
        token_channels: C of the tokens.
        sequence: columns `[B, T, token_channels]` to frames `[B, T, out_channels]`.
        checkpointing: keep only the inputs of each stage or block and compute the rest again in backward.
    """

    checkpointing: bool = False

    def __init__(self, channels: int, sequence_units: int = 0) -> None:
        """Set the channels.

        Args:
            channels: C of the tokens.
            sequence_units: units a direction of the two LSTM layers, and channels of the frames; 0: no such layers.
        """
        super().__init__()
        self.token_channels = channels
        self.out_channels = sequence_units or channels
        self.sequence = bilstm_stack(channels, sequence_units) if sequence_units else nn.Identity()

    def mask_unit(self, wanted: str) -> str:
        """The unit in which `ops.draw_masks` hides this encoder's input."""
        raise NotImplementedError

    def features(self, images: Tensor, masks: Masks | None = None, rule: str = "anchored") -> Features:
        """Encode.

        Args:
            images: `[B, 3, H, W]`, normalised; hidden pixels may hold anything, NaN too.
            masks: of `ops.draw_masks` in this encoder's unit, True means hidden; None: the whole image is seen.
            rule: `anchored` or `any`: how a CNN carries the mask across its 25 -> 26 column pool.
        Raises:
            ValueError: images or masks of another size than the encoder's.
        """
        raise NotImplementedError

    def levels(self, images: Tensor, early: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two levels of one pass.

        Args:
            images: as of `features`.
            early: stages (CNN) or blocks (ViT) that the lower level has behind it, from 1.
            hidden: `[B, N]` bool, tokens that a ViT does not see; a CNN has none.
        Returns:
            the map `[B, C', h, w]` behind them, and the tokens of the whole encoder.
        """
        raise NotImplementedError

    def columns(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to one row a column of the image, `[B, T, C]`."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        """images `[B, 3, H, W]`, normalised, to tokens `[B, N, C]`."""
        return self.features(images).tokens

    def forward(self, images: Tensor) -> Tensor:
        """images `[B, 3, H, W]`, normalised, to frames `[B, T, C]`."""
        return self.masked_frames(self.tokens(images))

    def forward_masked(self, images: Tensor, masks: Masks, rule: str) -> tuple[Tensor, Tensor | None]:
        """The pass of masked image modelling: tokens and active of `features`; no hidden pixel reaches them."""
        found = self.features(images, masks, rule)
        return found.tokens, found.active

    def run_part(self, part: nn.Module, *arguments: Any) -> Tensor:
        """`part(*arguments)`; with `checkpointing` it keeps nothing but its arguments where there will be a backward.

        The second computation divides batch-norm statistics as the first did and leaves the running ones alone.

        Args:
            part: draws no random numbers.
            arguments: of its forward.
        """
        if not (self.checkpointing and torch.is_grad_enabled()):
            return part(*arguments)
        norms = norms_of(part)
        passes = norms[0].passes if norms else 1

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), batch_norm_state(norms, passes=passes, tracking=False)

        return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def masked_frames(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]`, of the masked pass or of the whole image, to frames `[B, T, C]`.

        A CNN's tokens are zero where they saw nothing.
        """
        return self.sequence(self.columns(tokens))


def check_images(images: Tensor, height: int, width: int | None = None) -> None:
    """Raise ValueError unless images are `[B, 3, height, width]` (any width where None)."""
    fits = images.dim() == 4 and tuple(images.shape[1:3]) == (3, height)
    if not fits or (width is not None and images.shape[3] != width):
        raise ValueError(f"images must be [B, 3, {height}, {width or 'W'}], got {list(images.shape)}")
