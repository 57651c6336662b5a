"""The usual pretraining method, around one encoder."""

from torch import Tensor, nn

from rcmstr_fast import models
from rcmstr_fast.config import PretrainConfig, num_frames
from rcmstr_fast.methods.protocol import Collectives, PretrainMethod, in_passes


class EncoderMethod(PretrainMethod):
    """A method around one rectifier and one encoder, which are what it exports.

    Attributes:
        rectifier: of `models.build_rectifier`.
        encoder: of `models.build_encoder`.
    """

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.rectifier = models.build_rectifier(config.model)
        self.encoder = models.build_encoder(config.model)
        self.encoder.checkpointing = config.train.checkpoint_activations

    def exported(self) -> dict[str, nn.Module]:
        """Encoder and rectifier."""
        return {"encoder": self.encoder, "rectifier": self.rectifier}

    def compile_networks(self) -> None:
        """The encoder's dense pass."""
        self.encoder.compile(dynamic=False)

    @property
    def num_frames(self) -> int:
        """Frames T of an image."""
        return num_frames(self.config.model)

    def apart(self, part: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`part` of several equal inputs [B, ..] as one batch, while its batch norm sees them one by one."""
        return in_passes(part, part, *inputs)

    def frames(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Frames [B, T, C] of each view [B, 3, H, W], encoded as one batch; batch norm sees the views one by one."""
        return in_passes(lambda x: self.encoder(self.rectifier(x)), self, *views)
