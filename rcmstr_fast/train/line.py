"""The line of a log that a person reads: the few fields that matter; metrics.jsonl has all of them."""

from collections.abc import Mapping
from typing import cast

#: Text lines that a short run has at least, and seconds after which a long one has another.
LINES, SECONDS = 20, 60.0


def due(line: Mapping[str, object], total: int, last_step: int | None, since: float) -> bool:
    """Whether a line is shown: the first, the last, every validation, and about `LINES` others or one a minute.

    Args:
        line: of the metrics.
        total: steps of the run.
        last_step: of the line that was shown last; None: none was.
        since: seconds since then.
    """
    step = cast(int, line["step"])
    if last_step is None or step >= total or "val_accuracy" in line or since >= SECONDS:
        return True
    return step - last_step >= total / LINES


def short(line: Mapping[str, float | int | None], total: int, eta: str) -> str:
    """The line in words: step, loss, alignment and spread of the features, speed, MFU, waiting; what is wrong, if anything.

    Args:
        line: of the metrics: `alignment_<level>` and `spread_<level>` of each level become the mean alignment and the
            least spread.
        total: steps of the run.
        eta: time that is left.
    """
    parts = [f"step {line['step']}/{total}"]
    if "val_accuracy" in line:
        names = {"val_accuracy": "validation accuracy", "val_ned": "1-NED", "val_cer": "CER"}
        return " ".join(parts + [f"{text} {number(line.get(name))}" for name, text in names.items()])
    if "loss" in line:
        parts.append(f"loss {number(line['loss'])}")
    for name, choose in (("alignment", _mean), ("spread", min)):
        found = [x for key, x in line.items() if key.startswith(f"{name}_") and x is not None]
        parts += [f"{name} {choose(found):.2f}"] if found else []
    if line.get("images_per_s") is not None:
        parts.append(f"{line['images_per_s']:.4g} images/s")
    if line.get("mfu_percent") is not None:
        parts.append(f"MFU {line['mfu_percent']:.0f} %")
    if line.get("data_wait_percent") is not None:
        parts.append(f"waiting for data {line['data_wait_percent']:.0f} %")
    for name, text in (("nonfinite", "NOT FINITE: steps"), ("broken", "broken pictures")):
        parts += [f"{text} {line[name]}"] if line.get(name) else []
    return " ".join([*parts, f"eta {eta}"])


def number(value: float | int | None) -> str:
    """Four digits; a dash where there is none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
