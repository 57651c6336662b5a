"""What the model of the step predicted before anything had been measured, the targets, and what came of both."""

from bench.records import NOT_YET, Records, Row, best, gpus, number, rows_of, steps

from rcmstr_fast.evaluation.report import markdown

#: provider -> (H200, A100) ms of a whole step: CNN, RCMSTR, B = 512, 32x100, bf16
STEP_MS = {
    "published style, float32": (538, 1200), "eager": (305, 676), "compile": (147, 337), "ours": (97, 227),
    "roofline": (62, 155),
}  # fmt: skip
#: part -> (floor, eager, torch.compile, ours) ms on an H200; the parts as the model cut them
PARTS_MS = {
    "dense convolutions": (45.8, 67, 67, 67), "masked pass": (3.3, 29, 29, 6.6), "norms, ReLU, residuals": (6.6, 29, 16, 10.6),
    "loss": (4.7, 169, 27, 8.5), "projector (BiLSTM)": (0.7, 5, 5, 2.5), "optimiser and momentum": (0.3, 3, 0.6, 0.4),
}  # fmt: skip
#: what the model took for granted: quantity -> value on an H200
ASSUMED = {
    "bf16 product, 8192^3": "790 TFLOP/s",
    "copy, bytes read and written": "4.3 TB/s",
    "share of the product's rate that cuDNN reaches in dense convolutions": "0.68 to 0.72",
    "the same of the masked convolution": "0.50 to 0.58",
    "the same of the loss": "0.55",
    "share of the copy's rate that elementwise work reaches": "0.85",
}
#: target -> where it is measured
TARGETS = {
    "CNN, B = 512: images/s of ours over torch.compile at least 1.5 (goal 2)": "compile-cnn",
    "CNN, B = 512: images/s of ours over eager at least 3": "step-cnn",
    "CNN, B = 512: share of the roofline, goal 65 %": "step-cnn",
    "ViT-Small, B = 512: MFU at least 45 %": "step-vit",
    "data-wait under 2 %": "real",
    "no host synchronisation in a steady step": "steady",
    "B = 512: GPU memory at most 60 % of the compiled baseline's": "compile-cnn",
    "CPU, tiny recipe: at least 1.3 times as fast as the plain PyTorch step": "cpu",
}
#: row of the learning table -> (its name in the paper, IIIT5K accuracy in % with CTC, with attention)
TABLE_ONE = {
    "seqmoco-nokl": ("SeqMoCo w/o KL", 41.63, 50.97), "seqmoco": ("SeqMoCo", 42.97, 51.83), "ere": ("+ ERE", 48.43, 56.30),
    "intra": ("+ INTRA", 51.90, 59.03), "inter": ("+ INTER (RCLSTR)", 54.83, 61.07), "rcmstr": ("RCMSTR", 64.97, 70.00),
}  # fmt: skip


def model(records: Records) -> str:
    """Predictions beside what was measured."""
    measured = {name: _measured_step(records, name) for name in STEP_MS}
    whole = [[name, number(h200, 0), number(a100, 0), measured[name]] for name, (h200, a100) in STEP_MS.items()]
    parts = [[name, *(number(x) for x in values), _measured_part(records, name)] for name, values in PARTS_MS.items()]
    taken = [[name, value, _measured_rate(records, name)] for name, value in ASSUMED.items()]
    return "\n\n".join([
        "## Predicted and measured",
        "The model counts operations and bytes of RCMSTR with the CNN at B = 512, 32x100 in bf16, and divides by assumed rates. "
        "Dense convolutions, which cuDNN runs, are two thirds of an optimal step.",
        markdown(["whole step", "H200 predicted ms", "A100 predicted ms", "measured ms"], whole),
        markdown(["part (H200, ms)", "floor", "eager", "torch.compile", "ours", "ours measured"], parts),
        markdown(["assumed", "value", "measured"], taken, left=2),
    ])  # fmt: skip


def _measured_step(records: Records, provider: str) -> str:
    if provider.startswith("published"):
        return "not part of the benchmark"
    texts = []
    for machine in gpus(records):
        rows = steps(records, machine)
        wanted = {"provider": "ours" if provider == "roofline" else provider, "encoder": "resnet29", "method": "rcmstr"}
        row = best(rows, batch=512, processes=1, width=1.0, **wanted)
        if row:
            texts.append(f"{machine} {number(row['floor_ms'] if provider == 'roofline' else row['ms'])}")
    return ", ".join(texts) or NOT_YET


def _measured_part(records: Records, name: str) -> str:
    known = {"masked pass": "masked pass", "loss": "loss", "projector (BiLSTM)": "projector",
             "optimiser and momentum": "update"}  # fmt: skip
    texts = []
    for machine in gpus(records):
        found = rows_of(records, machine, "gpu-parts")
        row = best(
            [r for r in found if r.get("part") == known.get(name)], provider="ours", encoder="resnet29", batch=512
        )
        if row:
            texts.append(f"{machine} {number(row['ms'])}")
        layers = [r for r in rows_of(records, machine, "gpu-ceilings") if r.get("what") == "products of a step"]
        products = next((r["ms"] for r in layers if r["encoder"] == "resnet29"), None)
        encoder = best([r for r in found if r.get("part") == "encoder"], provider="ours", encoder="resnet29", batch=512)
        if name == "dense convolutions" and products is not None:
            texts.append(f"{machine} {number(products)} (layers alone)")
        if name.startswith("norms") and encoder and products is not None:
            texts.append(f"{machine} {number(encoder['ms'] - products)} (encoder less its layers)")
    return ", ".join(texts) or NOT_YET


def _measured_rate(records: Records, name: str) -> str:
    texts = []
    for machine in gpus(records):
        rows = rows_of(records, machine, "gpu-ceilings")
        product = next((r["tflop_per_s"] for r in rows if r.get("what") == "product"), None)
        copy = next((r["gbyte_per_s"] for r in rows if r.get("what") == "copy"), None)
        dense = [r for r in rows if r.get("what") == "layer" and r["encoder"] == "resnet29"]
        if name.startswith("bf16 product") and product:
            texts.append(f"{machine} {number(product, 0)} TFLOP/s")
        elif name.startswith("copy") and copy:
            texts.append(f"{machine} {number(copy / 1e3, 2)} TB/s")
        elif "cuDNN" in name and dense and product:
            flop, time = (sum(r[k] * r["count"] for r in dense) for k in ("tflop", "ms"))
            texts.append(f"{machine} {number(1e3 * flop / time / product, 2)}")
    return ", ".join(texts) or NOT_YET


def targets(records: Records) -> str:
    """Every target with its measured value."""
    rows = [[text, _reached(records, text, piece)] for text, piece in TARGETS.items()]
    return "## Targets\n\n" + markdown(["target", "measured"], rows, left=2)


def _reached(records: Records, text: str, piece: str) -> str:
    texts = []
    for machine in ["cpu"] if piece == "cpu" else gpus(records):
        value = _value(records, machine, text)
        if value:
            texts.append(value if machine == "cpu" else f"{machine}: {value}")
    return ", ".join(texts) or ("not yet measured" if piece == "cpu" else NOT_YET)


def _value(records: Records, machine: str, text: str) -> str:
    rows = steps(records, machine)

    def pick(provider: str, encoder: str = "resnet29") -> Row | None:
        return best(rows, provider=provider, encoder=encoder, batch=512, method="rcmstr", processes=1)

    if machine == "cpu":
        eager, ours = (best(rows, provider=p, encoder="resnet29", width=0.25) for p in ("eager", "ours"))
        return f"{eager['best_ms'] / ours['best_ms']:.2f}" if eager and ours else ""
    ours = pick("ours")
    if "torch.compile" in text or "compiled" in text:
        made = [row for row in (pick("compile"), pick("compile_max")) if row]
        fastest = min(made, key=lambda row: row["ms"], default=None)
        if not (ours and fastest):
            return ""
        if "memory" in text:
            return f"{100 * ours['reserved_gib'] / fastest['reserved_gib']:.0f} %"
        return f"{fastest['ms'] / ours['ms']:.2f}"
    if "over eager" in text:
        eager = pick("eager")
        return f"{eager['ms'] / ours['ms']:.2f}" if eager and ours else ""
    if "roofline" in text:
        return f"{100 * ours['share_of_roofline']:.0f} %" if ours else ""
    if "MFU" in text:
        vit = pick("ours", "vit_small")
        return f"{100 * vit['mfu']:.0f} %" if vit and vit.get("mfu") else ""
    if "data-wait" in text:
        waits = [
            v for r in rows_of(records, machine, "gpu-real") for k, v in r.items() if "median" in k and "wait" in k
        ]
        return f"{max(waits):.2f} %" if waits else ""
    states = [row for row in rows_of(records, machine, "gpu-steady") if "synchronises" in row]
    return ("none" if all(row["status"] == "ok" for row in states) else "it does") if states else ""
