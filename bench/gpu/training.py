"""Pieces that train: a real run that is stopped and resumed, and what each method learns with an equal budget."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.recipes import configured, dotted, recipe, tiny
from bench.gpu.setting import ROOT, Rows, Setting
from bench.gpu.words import origin, words

#: Rows of the table: name -> recipe of recipes/, in the paper's order.
TABLE = {
    "seqmoco-nokl": "cnn_seqmoco_nokl",
    "seqmoco": "cnn_seqmoco",
    "ere": "cnn_ere",
    "intra": "cnn_ere_intra",
    "inter": "cnn_rclstr",
    "rcmstr": "cnn_rcmstr",
}
#: Fields of metrics.jsonl that the records keep.
_KEPT = (
    "step",
    "loss",
    "loss_mim",
    "loss_rcl",
    "loss_info_frame",
    "accuracy_frame",
    "accuracy_subword",
    "spread_subword",
    "images_per_s",
    "data_wait",
    "gpu_memory_gib",
    "grad_norm",
)


def real_run(setting: Setting) -> Rows:
    """Five minutes of training from an LMDB, stopped half-way by SIGTERM and resumed by the same command."""
    begun = time.monotonic()
    data = words(setting, "real", setting.choose(60_000, 16), 1)
    rendered = time.monotonic() - begun
    run = setting.work / "real-run"
    values = recipe(setting, "resnet29", steps=10_000_000, log_every=setting.choose(50, 1))
    values |= {"run": str(run), "data.roots": [str(data)], "optim.warmup_steps": 500}
    configured(values, setting.changes)  # a wrong field is named before the run begins
    path = setting.work / "real.json"
    path.write_text(json.dumps({"values": values, "changes": setting.changes}), encoding="utf-8")
    left = setting.limit - 60 - (time.monotonic() - begun)
    seconds = setting.choose(min(150.0, left / 2), 1.0)
    rows: Rows = [{"what": "render", "words": setting.choose(60_000, 16), "seconds": rendered}]
    for part in ("first", "resumed"):
        before = last_step(run)
        status, text = run_for(seconds, path, run, before)
        kept = metrics(run, before)
        stopped = status == 128 + signal.SIGTERM
        row: dict[str, Any] = {"what": part, "status": "ok" if stopped and kept else "failed", "exit": status}
        if row["status"] == "failed":
            row["reason"] = text[-600:]
        row |= {"from_step": before, "to_step": last_step(run), "seconds": seconds, "metrics": kept[-40:]}
        rows.append(row | summary(kept))
    return rows


def run_for(seconds: float, config: Path, run: Path, before: int) -> tuple[int, str]:
    """Train in a process of its own for `seconds` after its first logged step, then SIGTERM: (exit status, stderr)."""
    command = [sys.executable, "-m", "bench.gpu.train", str(config)]
    log = run.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        patience = time.monotonic() + 120
        while process.poll() is None and not metrics(run, before) and time.monotonic() < patience:
            time.sleep(0.2)
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode, log.read_text(encoding="utf-8")


def metrics(run: Path, after: int = 0) -> Rows:
    """Lines of metrics.jsonl behind a step, without the fields that no table shows."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            continue  # a line that is being written
        if entry.get("step", 0) > after:
            found.append({name: entry[name] for name in _KEPT if name in entry} | _speed(entry))
    return found


def _speed(entry: dict[str, Any]) -> dict[str, Any]:
    """Whatever the log calls speed, waiting and memory."""
    return {k: v for k, v in entry.items() if any(part in k for part in ("images", "wait", "memory", "gib"))}


def last_step(run: Path) -> int:
    """The last logged step of a run."""
    return max((entry["step"] for entry in metrics(run)), default=0)


def summary(kept: Rows) -> dict[str, Any]:
    """Medians of the speeds over the lines of a run, without its first one (warm-up)."""
    lines = kept[1:] or kept
    names = {name for line in lines for name in _speed(line)}
    middle = {}
    for name in sorted(names):
        values = sorted(line[name] for line in lines if isinstance(line.get(name), int | float))
        if values:
            middle[f"median_{name}"] = values[len(values) // 2]
    return middle


def learning(setting: Setting, row: str) -> Rows:
    """One row of the table: render, pretrain, a CTC and an attention decoder over the frozen encoder, test."""
    import yaml

    from rcmstr_fast.evaluation.probe import probe
    from rcmstr_fast.train.loop import pretrain

    begun = time.monotonic()
    sets = _sets(setting)
    rendered = time.monotonic() - begun
    values = dotted(yaml.safe_load((ROOT / "recipes" / f"{TABLE[row]}.yaml").read_text(encoding="utf-8")))
    folder = setting.work / f"learning-{row}-s{setting.seed}{setting.tag and '-' + setting.tag}"
    steps = setting.steps or setting.choose(3000, 2)
    values |= {
        "run": str(folder / "pretrain"),
        "seed": setting.seed,
        "data.roots": [str(sets["unlabelled"])],
        "train.global_batch_size": 256,
        "train.steps": steps,
        "train.device": setting.device,
        "train.save_every": steps,
        "train.log_every": setting.choose(100, 1),
        "train.precision": "auto",
    }
    config = configured(values | (tiny() if setting.dry else {}), setting.changes)
    start = time.monotonic()
    run = pretrain(config)
    trained = time.monotonic() - start
    kept = metrics(Path(run))
    rows: Rows = [
        {
            "what": "pretraining",
            "row": row,
            "seed": setting.seed,
            "steps": steps,
            "changes": list(setting.changes),
            "batch": config.train.global_batch_size,
            "seconds": trained,
            "render_seconds": rendered,
            "words": origin(setting),
            "metrics": kept[-30:],
            **summary(kept),
        }
    ]
    for decoder in ("ctc", "attention"):
        start = time.monotonic()
        result = probe(_probe_config(setting, folder, run, sets, decoder))
        for found in result.sets:
            rows.append(
                {
                    "what": "test",
                    "row": row,
                    "seed": setting.seed,
                    "decoder": decoder,
                    "set": found.set,
                    "protocol": found.protocol,
                    "total": found.total,
                    **vars(found.score),
                    "seconds": time.monotonic() - start,
                    "decoder_steps": result.info["steps"],
                }
            )
    return rows


def _sets(setting: Setting) -> dict[str, Path]:
    """Rendered words for pretraining and decoders, and the test words."""
    sets = {
        "unlabelled": words(setting, "unlabelled", setting.choose(100_000, 16), 2),
        "labelled": words(setting, "labelled", setting.choose(30_000, 24), 3),
    }
    if not setting.test:
        return sets | {"rendered": words(setting, "rendered", setting.choose(3_000, 8), 4)}
    from rcmstr_fast.data.convert import convert

    source, made = Path(setting.test), setting.work / f"test-{Path(setting.test).stem}"
    if (source / "data.mdb").is_file():
        return sets | {source.name: source}
    if not made.exists():
        convert(str(source), str(made))
    return sets | {source.stem: made}


def _probe_config(setting: Setting, folder: Path, run: Path, sets: dict[str, Path], decoder: str) -> Any:
    from rcmstr_fast.evaluation.config import ProbeConfig

    tests = [f"{name}={path}" for name, path in sets.items() if name not in ("unlabelled", "labelled")]
    steps = setting.choose(2000, 2)
    return ProbeConfig(
        run=str(folder / decoder),
        title=f"{folder.name} {decoder}",
        encoder=str(run),
        train=[str(sets["labelled"])],
        test=tests,
        decoder=decoder,
        steps=steps,
        batch_size=setting.choose(256, 4),
        eval_every=max(1, steps // 4),  # type: ignore[arg-type]
        lr=1e-3,
        device=setting.device,
        seed=setting.seed,
        augment="none",  # type: ignore[arg-type]
        decoder_hidden=setting.choose(256, 8),
    )
