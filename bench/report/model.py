"""The page's section on what the compiled kernels predict: `python -m bench.aot --model`."""

import json
from pathlib import Path
from typing import Any

from bench.report.rows import number
from rcmstr_fast.evaluation.report import markdown

_ABOUT = """Predicted, not measured: `python -m bench.aot --model` disassembles what Triton and ptxas make of the
kernels, takes the main loop, counts its instructions by pipe, and runs it in order on a model of a quarter of a
multiprocessor. The bound is the busiest pipe alone. Shapes: RCMSTR with the CNN, B = 512, five loss terms
over queues of 65,536 rows; one 3x3 layer of a stage, 70 % hidden, forward with statistics and both
gradients, beside its three dense products at the rate taken for cuDNN. The terms are taken as launched
one by one, each in its own tile; in one launch a pass, the prior where it fits, the terms between levels
run in the levels' tile. Expect +-25 %."""
#: Pipes of the table, in its order.
_PIPES = ("tensor", "shared", "global", "mufu", "fma", "alu", "issue")


def section(results: Path) -> str:
    """Totals beside the goals, before and after; then every kernel."""
    path = results / "aot" / "model.json"
    if not path.is_file():
        return ""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    former = {(row["machine"], row["what"]): row for row in record["before"]}
    body = []
    for row in record["totals"]:
        old = former.get((row["machine"], row["what"]), {})
        ratio = number(row.get("ratio"), 1)
        was = " / ".join(filter(None, (number(old.get("ms"), 2), number(old.get("ratio"), 1) if ratio != "-" else "")))
        now = " / ".join(filter(None, (number(row["ms"], 2), ratio if ratio != "-" else "")))
        body.append([row["machine"], row["what"], number(row["bound_ms"], 2), was, now, row["goal"]])
    tried = record.get("tried", [])
    head = ["GPU", "what", "bound, ms", "before, ms / x dense", "predicted, ms / x dense", "goal"]
    kernels = [
        [
            row["machine"],
            row["part"],
            row["kernel"],
            row["programs"],
            *(number(row["cycles"].get(pipe), 0) for pipe in _PIPES),
            number(row["simulated"], 0),
            number(row["bound_ms"], 2),
            number(row["ms"], 2),
        ]
        for row in record["kernels"]
    ]
    heads = ["GPU", "part", "kernel", "programs", *_PIPES, "simulated", "bound, ms", "ms"]
    return "\n\n".join(
        [
            "## Predicted from compiled code",
            _ABOUT,
            markdown(head, body, left=2),
            *(
                ["Tried on the model, taken or not, and what is open:", "\n".join(f"- {line}" for line in tried)]
                if tried
                else []
            ),
            "<details><summary>cycles of an iteration of a program, by pipe</summary>",
            markdown(heads, kernels, left=3),
            "</details>",
        ]
    )
