"""What the model of the step predicted before anything had been measured on a GPU, and the targets.

Each prediction and target knows how to find its own measured value in the records; the pages show a column of measured
values as soon as a GPU has left a record.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.report.rows import Records, Row, best, good, gpus, group, number, piece, shortest
from rcmstr_fast.evaluation.report import markdown

#: (records, machine) -> the measured value in words; empty where there is none
Found = Callable[[Records, str], str]


def step_of(records: Records, machine: str, provider: str, encoder: str = "resnet29") -> Row | None:
    """The whole step of RCMSTR at B = 512 on one process."""
    rows = group(records, machine, "step")
    return best(rows, provider=provider, encoder=encoder, batch=512, method="rcmstr", processes=1, width=1.0)


def step_ms(provider: str) -> Found:
    """Time of a provider's step."""

    def found(records: Records, machine: str) -> str:
        row = step_of(records, machine, provider)
        return number(row["ms"]) if row else ""

    return found


def floor_ms(records: Records, machine: str) -> str:
    """The floor of the step, from the rates measured in its run."""
    row = step_of(records, machine, "ours")
    return number(row["floor_ms"]) if row else ""


def nothing(records: Records, machine: str) -> str:
    """No benchmark measures it."""
    return ""


def part_ms(name: str) -> Found:
    """Time of a part of our step."""

    def found(records: Records, machine: str) -> str:
        row = _part(records, machine, name)
        return number(row["ms"]) if row else ""

    return found


def _part(records: Records, machine: str, name: str) -> Row | None:
    return best(piece(records, machine, "parts"), part=name, provider="ours", encoder="resnet29", batch=512)


def _layers_ms(records: Records, machine: str) -> float | None:
    rows = piece(records, machine, "ceilings")
    return next((r["ms"] for r in rows if r.get("what") == "products of a step" and r["encoder"] == "resnet29"), None)


def layers_ms(records: Records, machine: str) -> str:
    """Time of the encoder's dense layers, each alone."""
    found = _layers_ms(records, machine)
    return "" if found is None else f"{number(found)} (layers alone)"


def between_layers_ms(records: Records, machine: str) -> str:
    """Time of the encoder less that of its layers."""
    layers, encoder = _layers_ms(records, machine), _part(records, machine, "encoder")
    return f"{number(encoder['ms'] - layers)} (encoder less its layers)" if encoder and layers is not None else ""


def _ceiling(records: Records, machine: str, what: str, field: str) -> float | None:
    return next((r[field] for r in piece(records, machine, "ceilings") if r.get("what") == what), None)


def product_rate(records: Records, machine: str) -> str:
    """Rate of a large product."""
    rate = _ceiling(records, machine, "product", "tflop_per_s")
    return f"{number(rate, 0)} TFLOP/s" if rate else ""


def copy_rate(records: Records, machine: str) -> str:
    """Rate of a large copy."""
    rate = _ceiling(records, machine, "copy", "gbyte_per_s")
    return f"{number(rate / 1e3, 2)} TB/s" if rate else ""


def cudnn_share(records: Records, machine: str) -> str:
    """Rate of the encoder's dense layers over that of a large product."""
    rate = _ceiling(records, machine, "product", "tflop_per_s")
    rows = [r for r in piece(records, machine, "ceilings") if r.get("what") == "layer" and r["encoder"] == "resnet29"]
    if not rate or not rows:
        return ""
    flop, ms = (sum(r[field] * r["count"] for r in rows) for field in ("tflop", "ms"))
    return number(1e3 * flop / ms / rate, 2)


#: whole step: CNN, RCMSTR, B = 512, 32x100, bf16 -> (H200 ms, A100 ms, measured)
STEPS: dict[str, tuple[float, float, Found]] = {
    "published style, float32": (538, 1200, nothing),
    "eager": (305, 676, step_ms("eager")),
    "compile": (147, 337, step_ms("compile")),
    "ours": (97, 227, step_ms("ours")),
    "roofline": (62, 155, floor_ms),
}
#: part of the step on an H200 -> ((floor, eager, torch.compile, ours) ms, ours measured)
PARTS: dict[str, tuple[tuple[float, float, float, float], Found]] = {
    "dense convolutions": ((45.8, 67, 67, 67), layers_ms),
    "masked pass": ((3.3, 29, 29, 6.6), part_ms("masked pass")),
    "norms, ReLU, residuals": ((6.6, 29, 16, 10.6), between_layers_ms),
    "loss": ((4.7, 169, 27, 8.5), part_ms("loss")),
    "projector (BiLSTM)": ((0.7, 5, 5, 2.5), part_ms("projector")),
    "optimiser and momentum": ((0.3, 3, 0.6, 0.4), part_ms("update")),
}
#: what the model took for granted on an H200 -> (value, measured)
ASSUMED: dict[str, tuple[str, Found]] = {
    "bf16 product, 8192^3": ("790 TFLOP/s", product_rate),
    "copy, bytes read and written": ("4.3 TB/s", copy_rate),
    "share of the product's rate that cuDNN reaches in dense convolutions": ("0.68 to 0.72", cudnn_share),
    "the same of the masked convolution": ("0.50 to 0.58", nothing),
    "the same of the loss": ("0.55", nothing),
    "share of the copy's rate that elementwise work reaches": ("0.85", nothing),
}


def over_compiled(records: Records, machine: str) -> str:
    """Speed of ours over the faster of the two compiled baselines."""
    ours, compiled = step_of(records, machine, "ours"), _compiled(records, machine)
    return number(compiled["ms"] / ours["ms"], 2) if ours and compiled else ""


def _compiled(records: Records, machine: str) -> Row | None:
    rows = [step_of(records, machine, name) for name in ("compile", "compile_max")]
    return min((row for row in rows if row), key=lambda row: row["ms"], default=None)


def over_eager(records: Records, machine: str) -> str:
    """Speed of ours over the eager baseline."""
    ours, eager = step_of(records, machine, "ours"), step_of(records, machine, "eager")
    return number(eager["ms"] / ours["ms"], 2) if ours and eager else ""


def roofline_share(records: Records, machine: str) -> str:
    """Floor over time of our step."""
    row = step_of(records, machine, "ours")
    return f"{number(row['share_of_roofline'], 0, 100)} %" if row else ""


def vit_mfu(records: Records, machine: str) -> str:
    """MFU of our step with the ViT."""
    row = step_of(records, machine, "ours", "vit_small")
    return f"{number(row['mfu'], 0, 100)} %" if row and row.get("mfu") else ""


def data_wait(records: Records, machine: str) -> str:
    """Largest median share of a real run that waits for data."""
    rows = piece(records, machine, "real")
    waits = [value for row in rows for name, value in row.items() if name.startswith("median_") and "wait" in name]
    return f"{max(waits):.2f} %" if waits else ""


def steady(records: Records, machine: str) -> str:
    """Whether a steady step waits for the device."""
    rows = [row for row in piece(records, machine, "steady") if "synchronises" in row]
    return ("none" if len(good(rows)) == len(rows) else "it does") if rows else ""


def memory_share(records: Records, machine: str) -> str:
    """Memory of ours over that of the compiled baseline."""
    ours, compiled = step_of(records, machine, "ours"), _compiled(records, machine)
    return f"{100 * ours['reserved_gib'] / compiled['reserved_gib']:.0f} %" if ours and compiled else ""


def cpu_over_eager(records: Records, machine: str) -> str:
    """Speed of ours over eager with the tiny recipe, best of alternating steps."""
    rows = group(records, machine, "step")
    eager, ours = (best(rows, provider=name, encoder="resnet29", width=0.25) for name in ("eager", "ours"))
    return number(shortest(eager) / shortest(ours), 2) if eager and ours else ""


@dataclass(frozen=True)
class Target:
    """Something to be reached.

    Attributes:
        text: what.
        measured: finds what was reached.
        piece: of `make gpu` that measures it; `cpu`: `make bench`.
    """

    text: str
    measured: Found
    piece: str


TARGETS = (
    Target("CPU, tiny recipe: at least 1.3 times as fast as the plain PyTorch step", cpu_over_eager, "cpu"),
    Target("CNN, B = 512: images/s of ours over torch.compile at least 1.5 (goal 2)", over_compiled, "compile-cnn"),
    Target("CNN, B = 512: images/s of ours over eager at least 3", over_eager, "step-cnn"),
    Target("CNN, B = 512: share of the roofline, goal 65 %", roofline_share, "step-cnn"),
    Target("ViT-Small, B = 512: MFU at least 45 %", vit_mfu, "step-vit"),
    Target("data-wait under 2 %", data_wait, "real"),
    Target("no host synchronisation in a steady step", steady, "steady"),
    Target("B = 512: GPU memory at most 60 % of the compiled baseline's", memory_share, "compile-cnn"),
)


def section(records: Records) -> str:
    """The page's section on GPUs: targets, predictions, and beside them what was measured, if anything was."""
    machines = gpus(records)
    targets = [target for target in TARGETS if target.piece != "cpu"]
    wholes = [([name, number(h200, 0), number(a100, 0)], found) for name, (h200, a100, found) in STEPS.items()]
    parts = [([name, *(number(x) for x in values)], found) for name, (values, found) in PARTS.items()]
    taken = [([name, value], found) for name, (value, found) in ASSUMED.items()]
    head = "## Predicted for a GPU"
    if not machines:
        head += (
            "\n\nNothing in this section is measured: no GPU has run `make gpu` for these sources yet. The figures\n"
            "come from a model that stood before any measurement."
        )
    return "\n\n".join(
        [
            head,
            "The model counts operations and bytes of RCMSTR with the CNN at B = 512, 32x100 in bf16, and divides\n"
            "by assumed rates. Dense convolutions, which cuDNN runs, are two thirds of an optimal step.",
            "![predicted steps](plots/predicted-steps.svg)",
            _beside(records, ["whole step", "H200, ms", "A100, ms"], wholes),
            _beside(records, ["part (H200, ms)", "floor", "eager", "torch.compile", "ours"], parts),
            _beside(records, ["assumed (H200)", "value"], taken, left=2),
            "Targets, and the piece of `make gpu` that measures each:",
            _beside(records, ["target", "piece"], [([t.text, t.piece], t.measured) for t in targets], left=2),
        ]
    )


def _beside(records: Records, head: list[str], rows: list[tuple[list[str], Found]], left: int = 1) -> str:
    """A table with one column of measured values for each GPU that has any."""
    machines = [name for name in gpus(records) if any(found(records, name) for _, found in rows)]
    body = [[*cells, *(found(records, name) or "-" for name in machines)] for cells, found in rows]
    return markdown([*head, *(f"{name}, measured" for name in machines)], body, left=left)
