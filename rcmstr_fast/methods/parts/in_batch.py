"""Two views of every image, whose rows are each other's positives and whose batch holds the negatives."""

import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.config import MethodConfig, PretrainConfig, Training, require
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.monitors import pair_accuracy, spread
from rcmstr_fast.methods.protocol import Batch, StepOutput
from rcmstr_fast.ops.precision import full_precision

#: How SeqCLR trains its own method and SimCLR (appendix C).
ADADELTA = Training(
    batch=1024,
    epochs=5,
    optimizer="adadelta",
    lr=10.0,
    lr_batch=0,
    weight_decay=1e-4,
    schedule="step",
    warmup_steps=0,
    clip=5.0,
)


def check_negatives(method: MethodConfig, run: PretrainConfig) -> None:
    """Raise ConfigError where a micro-batch is a single image: the others are the negatives."""
    images = int(run.train.global_batch_size or 0) // run.train.accumulate
    expected = (
        f"train.global_batch_size / train.accumulate must be 2 or more images for method {method.name} "
        "(the others of a micro-batch are the negatives)"
    )
    require(images >= 2, expected, images)


def unit_rows(instances: Tensor) -> Tensor:
    """Instances `[B, n, D]` to unit rows `[B n, D]`, float32 or float64."""
    return F.normalize(full_precision(instances), dim=-1).flatten(0, 1)


class InBatchMethod(EncoderMethod):
    """Encoder, head, NT-Xent between the views `one` and `two`, with gradient on both sides.

    A subclass gives `temperature`, `views` and `head`.

    Attributes:
        head: frames `[B, T, C]` to instances `[B, n, D]`.
        temperature: of the similarities.
    """

    head: nn.Module
    temperature: float

    def scale(self, batch: Batch, rows: int) -> float:
        """Factor of the mean over rows.

        Args:
            batch: the micro-batch.
            rows: rows of both views of this process.
        """
        return 1.0

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`; the negatives are those of the micro-batch, of all processes."""
        frames = self.frames(batch.views["one"], batch.views["two"])
        one, two = (unit_rows(x) for x in self.apart(self.head, *frames))
        others = self.collectives
        loss = ops.nt_xent(one, two, self.temperature, gather=others.gather_with_grad, rank=others.rank)
        watched: dict[str, Tensor] = {}
        if monitor:
            rows = one.detach(), two.detach()
            watched = {"spread": spread(rows[0]), "accuracy": pair_accuracy(*rows)}
        return StepOutput(loss * self.scale(batch, 2 * len(one)), {"loss_contrast": loss.detach()}, watched)
