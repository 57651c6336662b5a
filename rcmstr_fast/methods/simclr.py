"""SimCLR (Chen et al., ICML 2020) as SeqCLR compares itself with: one vector an image (SeqCLR section 5, appendix D).

SimCLR Contextual is the same with `model.sequence=bilstm`: the encoder ends with a sequence model.
"""

from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from rcmstr_fast.config import MethodConfig, PretrainConfig
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.heads import Instances, build_head
from rcmstr_fast.methods.parts.in_batch import ADADELTA, InBatchMethod, check_negatives
from rcmstr_fast.methods.protocol import Collectives, ViewSpec
from rcmstr_fast.methods.registry import register


@dataclass
class SimCLRConfig(MethodConfig):
    """SimCLR: one vector an image; contextual with model.sequence=bilstm.

    Attributes:
        name: simclr.
        instances: what the vector is made of: flatten (all frames side by side) or all (their mean).
        head_hidden: width of the head's middle layer; 0: that of a frame.
        head_norm: batch norm in the middle of the head.
        temperature: of the similarities.
        augment: preset of the views: simclr (crops, flips, colours) or pretrain (that of SeqCLR).
    """

    cnn = ADADELTA
    name: str = "simclr"
    instances: Literal["flatten", "all"] = "flatten"
    head_hidden: int = number(0, low=0)
    head_norm: bool = True
    temperature: float = number(0.1, above=0)
    augment: Literal["simclr", "pretrain"] = "simclr"

    def check(self, run: PretrainConfig) -> None:
        """There must be negatives."""
        check_negatives(self, run)


@register(
    paper="SimCLR (Chen et al., ICML 2020), for words as in SeqCLR",
    needs=("negatives of the batch",),
    accumulates=False,
    tiny={"head_hidden": 16, "bn_group_size": 2},
)
class SimCLR(InBatchMethod):
    """NT-Xent between the two vectors of each image."""

    Config = SimCLRConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own = cast(SimCLRConfig, config.method)
        self.temperature = own.temperature
        channels = self.encoder.out_channels
        inputs = channels * (self.num_frames if own.instances == "flatten" else 1)
        mlp = build_head(
            "mlp", inputs, config.model.feature_dim, hidden=own.head_hidden or channels, norm=own.head_norm
        )
        self.head = nn.Sequential(Instances(own.instances, self.num_frames), mlp)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """Two views of one preset."""
        preset = cast(SimCLRConfig, config.method).augment
        return ViewSpec("one", preset), ViewSpec("two", preset)
