"""Where a step's time goes: each part alone, forward and backward, at the sizes it has in the step.

The parts are those of `rcmstr_fast.methods.costs`; `encoder` is products and norms together, as nothing runs them apart.
On a GPU the parts of ours are timed as graph replays where they can be captured, as they are in the captured step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.step.baseline import Baseline
from rcmstr_fast import ops, timer
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.ceilings import Ceilings
from rcmstr_fast.measure.records import Row
from rcmstr_fast.measure.running import OurStep, StepInputs, precision_of
from rcmstr_fast.methods.costs import step_works
from rcmstr_fast.methods.permutation import permuted_order

Run = Callable[[], Any]
#: measured part -> parts of the floor
PARTS = {
    "encoder": ("products", "norms"),
    "masked pass": ("masked pass",),
    "reconstruction": ("reconstruction",),
    "projector": ("projector",),
    "features": ("features",),
    "loss": ("loss",),
    "update": ("update",),
}


class Sides:
    """The tensors between the parts, and what both implementations share."""

    def __init__(self, config: PretrainConfig, batch: StepInputs, bf16: bool) -> None:
        self.config, self.batch, self.bf16 = config, batch, bf16
        self.device = batch.query.device
        self.permute, self.masked = bool(config.method.permute), config.method.name == "rcmstr"
        self.order = permuted_order(batch.index, batch.epoch, config.method, config.seed) if self.permute else None
        self.views = [batch.query, *([batch.permuted] if self.permute else [])]
        if self.masked:
            unit = "token" if config.model.encoder.startswith("vit") else config.method.mask_unit
            self.masks = ops.draw_masks(
                batch.index,
                seed=config.seed,
                epoch=batch.epoch,
                size=(config.model.height, config.model.image_width),
                unit=unit,
                mask_ratio=config.method.mask_ratio,
                num_blocks=config.method.num_blocks,
            )

    def autocast(self) -> Any:
        """The precision of the step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def runs(self) -> dict[str, Run]:
        """Part -> one call of it."""
        with torch.no_grad(), self.autocast():
            frames = self.encode(self.views)
            projected = self.project(frames)
            rows = [self.rows(x, i) for i, x in enumerate(projected)]
            key = self.rows(self.key_project(self.key_encode()), 0, key=True)
        found = {
            "encoder": lambda: (self._both(self.encode, self.views, leaves=False), self.key_encode()),
            "projector": lambda: (self._both(self.project, frames), self._plain(self.key_project, frames[0])),
            "features": lambda: (
                [self._both(lambda x, i=i: list(self.rows(x, i).values()), x) for i, x in enumerate(projected)],
                self._plain(lambda x: self.rows(x, 0, key=True), projected[0]),
            ),
            "loss": lambda: self.contrast([{k: leaf(v) for k, v in side.items()} for side in rows], key),
            "update": lambda: self.update(key),
        }
        if self.masked:
            with torch.no_grad(), self.autocast():
                features, active = self.encode_masked()
            found["masked pass"] = lambda: self._both(lambda: self.encode_masked()[0])
            found["reconstruction"] = lambda: self._both(lambda x: self.reconstruct(x, active), features)
        return {name: found[name] for name in PARTS if name in found}

    def _both(self, call: Callable[..., Any], *inputs: Any, leaves: bool = True) -> None:
        """Forward and backward of `call` with ones as the gradient of its results."""
        taken = [[leaf(x) for x in i] if isinstance(i, list) else leaf(i) for i in inputs] if leaves else inputs
        with self.autocast():
            made = call(*taken)
        made = made if isinstance(made, list) else [made]
        torch.autograd.backward(made, [torch.ones_like(x) for x in made])

    def _plain(self, call: Callable[[Tensor], Any], x: Tensor) -> None:
        with torch.no_grad(), self.autocast():
            call(x)


def leaf(x: Tensor) -> Tensor:
    """The same values with a gradient of their own."""
    return x.detach().requires_grad_()


class OurSides(Sides):
    """The parts of the trainer's method."""

    def __init__(self, ours: OurStep, batch: StepInputs) -> None:
        super().__init__(ours.config, batch, precision_of(ours.config, ours.world.device) == "bf16")
        self.method, self.optimizer = ours.trainer.method, ours.trainer.optimizer

    def encode(self, views: list[Tensor]) -> list[Tensor]:  # noqa: D102
        return [*self.method.online.encode(torch.cat(views), len(views)).chunk(len(views))]

    def project(self, frames: list[Tensor]) -> list[Tensor]:  # noqa: D102
        return [*self.method.online.project(torch.cat(frames), len(frames)).chunk(len(frames))]

    def key_encode(self) -> Tensor:  # noqa: D102
        with torch.no_grad(), self.autocast():
            return self.method.momentum.network.encode(self.batch.key)

    def key_project(self, frames: Tensor) -> Tensor:  # noqa: D102
        return self.method.momentum.network.project(frames)

    def rows(self, projected: Tensor, side: int, key: bool = False) -> dict[str, Tensor]:  # noqa: D102
        network = self.method.momentum.network if key else self.method.online
        order = self.order if side else None
        return network.unit_rows(projected, self.config.method.num_subwords, order)

    def encode_masked(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        rule = self.config.method.mask_rule
        return self.method.online.encoder.forward_masked(self.batch.query, self.masks, rule)

    def reconstruct(self, features: Tensor, active: Tensor | None) -> Tensor:  # noqa: D102
        prediction = self.method.mim.head(features, active).float()
        return ops.masked_mse(prediction, self.batch.query.float() * 0.5 + 0.5, self.masks.pixels)

    def contrast(self, queries: list[dict[str, Tensor]], key: dict[str, Tensor]) -> None:  # noqa: D102
        queues = {level: self.method.queues[level] for level in self.method.levels}
        permuted = queries[1] if self.permute else None
        with self.autocast():
            loss, _ = self.method.loss(queries[0], permuted, key, queues, lambda level: queues[level].rows)
        loss.backward()

    def update(self, key: dict[str, Tensor]) -> None:  # noqa: D102
        self.optimizer.step()
        self.method.begin_step()
        for level, rows in key.items():
            self.method.queues[level].enqueue(rows)


class BaselineSides(Sides):
    """The parts of the baseline."""

    def __init__(self, baseline: Baseline, batch: StepInputs) -> None:
        super().__init__(baseline.config, batch, baseline.bf16)
        self.baseline = baseline

    def encode(self, views: list[Tensor]) -> list[Tensor]:  # noqa: D102
        return [self.baseline.online.encoder(x) for x in views]

    def project(self, frames: list[Tensor]) -> list[Tensor]:  # noqa: D102
        return [self.baseline.online.project(x) for x in frames]

    def key_encode(self) -> Tensor:  # noqa: D102
        with torch.no_grad(), self.autocast():
            return self.baseline.momentum["network"].encoder(self.batch.key)

    def key_project(self, frames: Tensor) -> Tensor:  # noqa: D102
        return self.baseline.momentum["network"].project(frames)

    def rows(self, projected: Tensor, side: int, key: bool = False) -> dict[str, Tensor]:  # noqa: D102
        network = self.baseline.momentum["network"] if key else self.baseline.online
        return network.rows(projected, self.config.method.num_subwords, self.order if side else None)

    def encode_masked(self) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        rule = self.config.method.mask_rule
        return self.baseline.online.encoder.forward_masked(self.batch.query, self.masks, rule)

    def reconstruct(self, features: Tensor, active: Tensor | None) -> Tensor:  # noqa: D102
        prediction = self.baseline.mim["head"](features, active).float()
        target = self.batch.query.float() * 0.5 + 0.5
        return ops.reference.masked_mse(prediction, target, self.masks.pixels)

    def contrast(self, queries: list[dict[str, Tensor]], key: dict[str, Tensor]) -> None:  # noqa: D102
        with self.autocast():
            self.baseline.contrast(queries, key, 1.0)

    def update(self, key: dict[str, Tensor]) -> None:  # noqa: D102
        self.baseline.optimizer.step()
        self.baseline.follow()
        self.baseline.enqueue(key)


def rows(
    provider: str, sides: Sides, ceilings: Ceilings, precision: str, repetitions: int, *, graphs: bool
) -> list[Row]:
    """One row a part: ms, TFLOP, GB, floor, share of the roofline.

    Args:
        provider: its name.
        sides: its parts.
        ceilings: of the device.
        precision: bf16 or fp32.
        repetitions: timed calls of each part.
        graphs: time graph replays where a part can be captured.
    """
    images = len(sides.batch.index)
    needed = step_works(sides.config, images, precision)
    found = []
    for name, run in sides.runs().items():
        mine = [w for w in needed if w.part in PARTS[name]]
        timed, recorded = timer.captured(run) if graphs and sides.device.type == "cuda" else (run, False)
        times = timer.measure(timed, sides.device, rounds=repetitions, cold=True)
        floor = ceilings.ms(mine)
        found.append(
            {
                "group": "parts",
                "provider": provider,
                "part": name,
                "batch": images,
                "encoder": sides.config.model.encoder,
                "precision": precision,
                "graph": recorded,
                "status": "ok",
                **times.row(),
                "tflop": sum(w.flop for w in mine) / 1e12,
                "gbyte": sum(w.bytes for w in mine) / 1e9,
                "floor_ms": floor,
                "share_of_roofline": floor / times.median,
            }
        )
    return found
