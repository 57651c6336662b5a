"""SimAN (Luo et al., CVPR 2022), after its description; its networks are not public, and sizes are ours.

Two neighbouring crops of one word share their style. One is augmented; what the encoder keeps of it is its content,
which takes the style of the other, and a decoder paints the crop as it was before the augmentation.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast import random
from rcmstr_fast.config import MethodConfig, PretrainConfig, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.monitors import detail, spread
from rcmstr_fast.methods.parts.painting import Discriminator, Painter, restyled
from rcmstr_fast.methods.protocol import Batch, Collectives, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import CNN, register
from rcmstr_fast.ops.augment_views import AugmentPreset
from rcmstr_fast.ops.precision import full_precision

#: What changes the look of a picture, not the place of anything in it.
LOOK = AugmentPreset(
    operations=tuple((n, 1.0) for n in ("contrast", "blur", "sharpen", "colour_jitter")), subset=(1, 4)
)


@dataclass
class SimANConfig(MethodConfig):
    """SimAN: paint a crop in the style of its neighbour.

    Attributes:
        name: siman.
        crop: width of each of the two crops in pixels; null: half the word, rounded down to a multiple of 4.
        painter_width: channels of the decoder's first map.
        discriminator_width: channels of the discriminator's first map.
        adversarial_weight: weight of the discriminator's opinion beside the squared error.
        discriminator_rate: learning rate of the discriminator over that of all else.
    """

    name: str = "siman"
    crop: int | None = number(None, low=8)
    painter_width: int = number(256, low=8)
    discriminator_width: int = number(32, low=1)
    adversarial_weight: float = number(0.01, low=0)
    discriminator_rate: float = number(2.0, above=0)

    def fill(self, run: PretrainConfig) -> None:
        """The widest crops that there are two of."""
        if self.crop is None:
            self.crop = (run.model.image_width or 100) // 8 * 4

    def check(self, run: PretrainConfig) -> None:
        """Two crops fit, and what is painted is what was seen."""
        width, name = run.model.image_width, self.name
        expected = (
            f"method.crop must be a multiple of 4 and at most half of model.image_width {width} for method {name}"
        )
        require(int(self.crop or 0) % 4 == 0 and 2 * int(self.crop or 0) <= width, expected, self.crop)
        expected = f"model.tps must be none for method {name} (the augmented crop must show what the plain one shows)"
        require(run.model.tps == "none", expected, run.model.tps)
        require(run.model.sequence == "none", f"model.sequence must be none for method {name}", run.model.sequence)


@register(
    paper="SimAN (Luo et al., CVPR 2022), after the description; sizes ours",
    encoders=CNN,
    needs=("discriminator",),
    tiny={"painter_width": 16, "discriminator_width": 4, "bn_group_size": 2},
)
class SimAN(EncoderMethod):
    """Squared error of the painted crop, and a discriminator that learns in the same backward (hinge losses)."""

    Config = SimANConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.own = cast(SimANConfig, config.method)
        size = config.model.height, int(self.own.crop or 0)
        self.painter = Painter(self.encoder.out_channels, size, self.own.painter_width)
        self.discriminator = Discriminator(self.own.discriminator_width)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """The word as it is, and another look of it."""
        return ViewSpec("plain", "none"), ViewSpec("changed", LOOK)

    @classmethod
    def draw(cls, config: PretrainConfig, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """Left edges of the crop that is painted and of its neighbour, [B] int64, which is as often left as right."""
        crop = int(cast(SimANConfig, config.method).crop or 0)
        words = random.words(index, 2, seed=config.seed, stream=random.CROPS, epoch=epoch)
        left = random.integers(words[:, 0], config.model.image_width - 2 * crop + 1)
        painted_right = random.integers(words[:, 1], 2)
        return {"painted": left + painted_right * crop, "neighbour": left + (1 - painted_right) * crop}

    def rates(self) -> dict[str, float]:
        """The discriminator has its own."""
        return {"discriminator.": self.own.discriminator_rate}

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        crop = int(self.own.crop or 0)
        changed = columns(batch.views["changed"], batch.drawn["painted"], crop)
        wanted = columns(batch.views["plain"], batch.drawn["painted"], crop)
        neighbour = columns(batch.views["plain"], batch.drawn["neighbour"], crop)
        content, style = self.frames(changed, neighbour)
        painted = self.painter(restyled(content, style)[0])
        error = (painted - full_precision(wanted)).square().mean()
        frozen = {name: x.detach() for name, x in self.discriminator.named_parameters()}
        fooled = -torch.func.functional_call(self.discriminator, frozen, (painted,)).mean()
        true, false = self.discriminator(full_precision(wanted)), self.discriminator(painted.detach())
        judged = F.relu(1.0 - true).mean() + F.relu(1.0 + false).mean()
        loss = error + self.own.adversarial_weight * fooled + judged
        terms = {
            "loss_painted": error.detach(),
            "loss_fooled": fooled.detach(),
            "loss_discriminator": judged.detach(),
            "loss": loss.detach(),
        }
        watched, sheet = {}, {}
        if monitor:
            everywhere = torch.ones_like(wanted[:, :1], dtype=torch.bool)
            watched = {
                "spread": spread(F.normalize(full_precision(content.detach()).mean(1), dim=1)),
                "detail": detail(painted.detach(), wanted, everywhere),
                "told": 0.5 * ((true > 0).float().mean() + (false < 0).float().mean()),
            }
        if pictures:
            shown = {"content": changed, "style": neighbour, "painted": painted, "true": wanted}
            sheet = {name: to_pixels(x) for name, x in shown.items()}
        return StepOutput(loss, terms, watched, sheet)


def columns(images: Tensor, start: Tensor, width: int) -> Tensor:
    """`width` columns of each image from its own start on: [B, C, H, width].

    Args:
        images: [B, C, H, W].
        start: [B] int64 in [0, W - width].
        width: of the result.
    """
    at = start[:, None] + torch.arange(width, device=start.device)
    return images.gather(3, at[:, None, None].expand(-1, *images.shape[1:3], -1))
