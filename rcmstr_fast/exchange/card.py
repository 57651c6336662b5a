"""The model card beside every exported file."""

import contextlib
from pathlib import Path
from typing import Any

import rcmstr_fast
from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.report import load_result, table
from rcmstr_fast.exchange.graph import OPSET
from rcmstr_fast.exchange.networks import Source
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.commit import commit

_NOT_STATED = "not stated"
_NOTES = {
    "timm": "Frames are those of this program's encoder, bit for bit with the same attention kernel.",
    "dtrb": "Names as in a checkpoint of DTRB's `test.py` (`--rgb`), whose run settings are in the snippet.",
    "parseq": "The encoder of PARSeq with patches of 4x4 pixels; its decoder is not in the file (`strict=False`).",
    "openocr": "The `ViT` encoder of OpenOCR (patch_size [4, 4]). Its LayerNorms use eps 1e-5 unless told otherwise, "
    "which moves the frames a little; the snippet sets 1e-6.",
    "onnx": f"Operator set {OPSET}, float32, free batch size. Logits are within 1e-4 of this program's.",
    "torchscript": "A traced graph, float32, free batch size; runs without this program.",
    "safetensors": "This program's own format.",
}


def write_card(source: Source, kind: str, out: Path, snippet: str, *, licence: str = "", calibration: str = "") -> Path:
    """Write the card of an exported file.

    Args:
        source: what was exported.
        kind: the format.
        out: the exported file.
        snippet: Python that loads it.
        licence: of the weights.
        calibration: a sentence on that of the confidences; empty: they are not calibrated.
    Returns:
        The card: `out` with the ending .md.
    """
    path = out.with_suffix(".md")
    parts = [f"# {out.name}", f"A {source.kind} for word images, in the format `{kind}`. {_NOTES[kind]}"]
    parts.append("\n".join(f"- **{name}**: {value}" for name, value in _rows(source, licence)))
    if source.recogniser is not None:
        parts.append(calibration or "Confidences are not calibrated.")
    if (results := _results(source)) is not None:
        parts.append(f"## Results\n\n{results}")
    parts.append(f"## Use\n\n```python\n{snippet.strip()}\n```")
    write_whole(path, lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    return path


def _rows(source: Source, licence: str) -> list[tuple[str, str]]:
    model, facts, recogniser = source.model, source.facts, source.recogniser
    size = f"width {model.width:g}" if model.encoder == "resnet29" else f"depth {model.depth}"
    rectifier = f"; TPS rectifier, align_corners={bool(model.tps_align_corners)}" if model.tps != "none" else ""
    sequence = "; two BiLSTM layers" if model.sequence != "none" else ""
    parameters = sum(p.numel() for p in (recogniser or source.encoder).parameters())
    rows = [
        ("Architecture", f"{model.encoder}, {size}{rectifier}{sequence}; {parameters:,} parameters"),
        ("Input", f"RGB, {model.height} x {model.image_width} (height x width), bicubic, aspect not kept"),
        ("Mean and deviation", "0.5 and 0.5 of pixels in [0, 1]"),
    ]
    if recogniser is not None:
        characters = "".join(recogniser.charset.characters)
        rows.append(("Decoder", f"{recogniser.decoder_name}; trained and tested in {recogniser.precision}"))
        rows.append(("Charset", f"{len(characters)} characters: `` {characters[:200]} ``"))
    else:
        rows.append(("Charset", "none, an encoder"))
    rows += [("Data", _data(facts)), ("Recipe", _recipe(facts))]
    rows.append(("Trained at", f"commit {facts.get('commit') or _NOT_STATED}"))
    rows.append(("Exported by", f"rcmstr_fast {rcmstr_fast.__version__}, commit {commit() or _NOT_STATED}"))
    rows.append(("Licence", f"of the weights: {licence or _NOT_STATED}; of the program: Apache-2.0"))
    return rows


def _data(facts: dict[str, Any]) -> str:
    if "origin" in facts:
        return f"imported from {facts['origin']}"
    if "config" in facts:
        roots = facts["config"].get("data", {}).get("roots") or [_NOT_STATED]
        return ", ".join(Path(root).name or root for root in roots)
    return f"{facts['train_words']} labelled words" if "train_words" in facts else _NOT_STATED


def _recipe(facts: dict[str, Any]) -> str:
    if "origin" in facts:
        return _NOT_STATED
    if "config" in facts:
        config = facts["config"]
        return f"{config['method']['name']}, preset {config['preset']}, seed {config['seed']}, {facts['step']} steps"
    if "mode" not in facts:
        return _NOT_STATED
    return (
        f"{facts['mode']}, encoder {Path(facts.get('encoder', '')).name or _NOT_STATED}, {facts.get('steps')} steps of "
        f"{facts.get('batch_size')} words, seed {facts.get('seed')}"
    )


def _results(source: Source) -> str | None:
    """The protocol table of the run folder, where there is one."""
    with contextlib.suppress(ConfigError):
        return table(load_result(source.file.parent))
    return None
