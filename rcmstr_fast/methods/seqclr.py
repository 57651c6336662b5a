"""SeqCLR: frames, windows of frames or their mean are the instances of a contrastive loss (Aberdam et al., CVPR 2021)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from rcmstr_fast.config import MethodConfig, PretrainConfig, Training, is_vit
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.heads import Instances, InstanceSettings, build_head
from rcmstr_fast.methods.parts.in_batch import ADADELTA, InBatchMethod, check_negatives
from rcmstr_fast.methods.protocol import Batch, Collectives, ViewSpec
from rcmstr_fast.methods.registry import register
from rcmstr_fast.ops.augment_views import PRESETS


@dataclass
class SeqCLRConfig(MethodConfig, InstanceSettings):
    """SeqCLR: all-, window- or frame-to-instance mapping.

    Attributes:
        name: seqclr.
        instances: all (one instance an image, the mean of the frames), window (`windows` adaptive averages) or frame.
        projection: head on the frames, before they are mapped: none, mlp (each frame on its own) or bilstm; null: mlp
            for instances=frame, bilstm otherwise (the best of the paper's Table 4).
        projection_dim: channels of the head's result, width of its layers, units of its LSTMs.
        temperature: of the similarities.
        reduction: sum (Eq. 1) or mean over the rows of a micro-batch, of all processes.
        crop_columns: largest share of the width that a view loses on each side; null: that of the preset `pretrain`
            (0.02; the paper's Figure 8 varies it).
    """

    cnn = ADADELTA
    name: str = "seqclr"
    instances: Literal["all", "window", "frame"] = "window"  # type: ignore[assignment]
    projection: Literal["none", "mlp", "bilstm"] | None = None
    projection_dim: int = number(256, low=1)
    temperature: float = number(0.1, above=0)
    reduction: Literal["sum", "mean"] = "sum"
    crop_columns: float | None = number(None, low=0, high=0.49)

    def fill(self, run: PretrainConfig) -> None:
        """The head that goes with the mapping."""
        if self.projection is None:
            self.projection = "mlp" if self.instances == "frame" else "bilstm"

    def check(self, run: PretrainConfig) -> None:
        """No more windows than frames, and negatives."""
        self.check_windows(run.model)
        check_negatives(self, run)

    def training(self, run: PretrainConfig) -> Training:
        """Frame-to-instance has a quarter of the batch (appendix C)."""
        if is_vit(run.model):
            return self.vit
        return dataclasses.replace(ADADELTA, batch=256) if self.instances == "frame" else ADADELTA


@register(
    paper="Sequence-to-Sequence Contrastive Learning for Text Recognition (Aberdam et al., CVPR 2021)",
    needs=("negatives of the batch",),
    accumulates=False,
    tiny={"projection_dim": 16, "bn_group_size": 2, "windows": 3},
)
class SeqCLR(InBatchMethod):
    """Head on the frames, mapping to instances, Eq. 1 between those of the two views."""

    Config = SeqCLRConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own = cast(SeqCLRConfig, config.method)
        self.temperature, self.reduction = own.temperature, own.reduction
        wide = own.projection_dim
        out = 0 if own.projection == "bilstm" else wide  # two BiLSTM layers are the head, nothing follows them
        head = build_head(own.projection or "none", self.encoder.out_channels, out, hidden=wide, norm=False)
        self.head = nn.Sequential(head, Instances(own.instances, self.num_frames, own.windows))

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """Two views, cropped sideways as `crop_columns` says."""
        preset: Any = "pretrain"
        largest = cast(SeqCLRConfig, config.method).crop_columns
        if largest is not None:
            preset = dataclasses.replace(PRESETS[preset], crop_columns=(0.0, largest))  # type: ignore[type-var]
        return ViewSpec("one", preset), ViewSpec("two", preset)

    def scale(self, batch: Batch, rows: int) -> float:
        """Eq. 1 is a sum over the rows of both views, here those of all processes and micro-batches of the step."""
        if self.reduction == "mean":
            return 1.0
        micro = 1 if batch.step_index is None else len(batch.step_index) // len(batch.index)
        return float(rows * self.collectives.world_size * micro)
