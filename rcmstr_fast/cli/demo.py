"""`rcmstr demo`: render words, pretrain, train a decoder three ways, and show what pretraining was worth."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast import env
from rcmstr_fast.config import ModelConfig, OptimConfig, PretrainConfig, RunError

if TYPE_CHECKING:
    from rcmstr_fast.evaluation.config import ProbeConfig
    from rcmstr_fast.evaluation.report import RunResult

NAME = "demo"
HELP = "the whole way in one command: render words, pretrain, probe, compare; run it again to continue"


@dataclass(frozen=True)
class Size:
    """How large a demo is.

    Attributes:
        crops: rendered words to pretrain on.
        labelled: rendered words with labels for the decoders.
        held_out: rendered words of the test; their texts are in no other set.
        words: what is rendered, fields of `rcmstr_fast.study.words.render_set`.
        model: the network.
        method: of the pretraining; its name and fields.
        optim: optimiser of the pretraining.
        pretrain_steps: steps of the pretraining.
        pretrain_batch: images a step of it.
        probe_steps: steps of the decoders of frozen encoders.
        probe_batch: words a step of them.
        probe_lr: of each decoder.
        probe_hidden: LSTM units a direction of each decoder.
        scratch_batch: words a step of the network that is trained from scratch; its steps are as many as fit into the
            time that pretraining and decoder took together.
        scratch_lr: its learning rate.
        small: plain float32, and decoders on one thread: fastest for so small a network on a processor.
    """

    crops: int
    labelled: int
    held_out: int
    words: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    optim: dict[str, Any]
    pretrain_steps: int
    pretrain_batch: int
    probe_steps: int
    probe_batch: int
    probe_lr: float
    probe_hidden: int
    scratch_batch: int
    scratch_lr: float
    small: bool = field(default=False)


#: Numbers in one font: what a small network learns to read in minutes. SeqCLR, since it learns the most in few and cheap
#: steps (docs/studies.md); a network of an eighth of the width, since many steps of it are worth more than few of a wider.
LAPTOP = Size(
    16_000, 20_000, 1_000,
    {"texts": "numbers", "shortest": 2, "longest": 3, "mild": True, "families": ["DejaVu Sans Mono"]},
    {"width": 0.125, "image_width": 44, "projector_hidden": 64},
    {"name": "seqclr", "instances": "window", "projection_dim": 64},
    {"name": "adamw", "schedule": "cosine", "weight_decay": 0.05, "lr": 4e-3},
    700, 32, 800, 128, 1e-2, 64, 32, 3e-3, True,
)  # fmt: skip
GPU = Size(
    200_000, 50_000, 3_000, {"texts": "words", "mixed": True}, {},
    {"name": "rcmstr", "queue_size": 65_536, "momentum": 0.999}, {"lr": 3e-4},
    4_000, 256, 4_000, 256, 1e-3, 256, 256, 1e-3,
)  # fmt: skip
#: Steps whose speed says how many the network from scratch gets.
_TIMED = 40


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, and optionally what on."""
    parser.add_argument("--run", type=str, default="runs/demo", help="folder for everything the demo makes")
    parser.add_argument(
        "--data",
        type=str,
        default="",
        help="your own word crops to pretrain on (LMDB or folder of images); rendered words if not given",
    )
    parser.add_argument(
        "--size", type=str, default="auto", choices=["auto", "laptop", "gpu"], help="auto: gpu where CUDA works"
    )


def run(arguments: Namespace) -> int:
    """Render, pretrain, probe three times, print one table and where page and pictures are."""
    from rcmstr_fast.evaluation.probe import probe
    from rcmstr_fast.train.distributed import choose_device

    cuda = choose_device("auto", 0).type == "cuda"
    size = {"auto": GPU if cuda else LAPTOP, "laptop": LAPTOP, "gpu": GPU}[arguments.size]
    folder = Path(arguments.run)
    words, clock = folder / "words", Clock(folder / "times.json")
    own = bool(arguments.data) and _take_labelled(arguments.data, words, size)
    if not own:
        _render(words, size, with_crops=not arguments.data)
    crops = arguments.data or str(words / "unlabelled")
    runs = {name: folder / name for name in ("pretrained", "untrained", "scratch")}
    with _one_thread(size.small):
        with clock.running("untrained"):
            untrained = probe(_frozen(runs["untrained"], "untrained encoder, frozen", "random", words, size))
        steps = _scratch_steps(folder / "timing", clock, crops, words, size)
        scratch = _scratch(runs["scratch"], steps, words, size)
        with beside(clock, "scratch", probe, scratch, at_once=size.small and env.threads() > 1):
            with clock.running("pretraining"):
                encoder = _pretrain(folder / "pretrain", crops, size)
            with clock.running("pretrained"):
                frozen = _frozen(runs["pretrained"], "pretrained encoder, frozen", str(encoder), words, size)
                results = [probe(frozen), untrained]
        results.append(probe(scratch))
    notes = [_budgets(size, steps)]
    if own:
        notes.append("Pretraining has seen the held-out images too, but no labels.")
    elif arguments.data:
        notes.append(f"{arguments.data} has too few labelled words for decoders: rendered words served instead.")
    table = _table(results, clock)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    page = _page(folder, encoder, runs, " ".join(notes))
    print(f"\n{table}\n\n" + "\n".join(notes))
    print(f"run folder: {folder}")
    pictures = [words / "held_out" / "samples.png", encoder / "views.png", runs["pretrained"] / "predictions.png"]
    print("\n".join(f"  {picture}" for picture in [*pictures, folder / "learning.svg", page] if picture.is_file()))
    return 0


class Clock:
    """Seconds of wall clock that each part has taken, also over interruptions.

    Args:
        path: JSON file that keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._writing = path, threading.Lock()
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextlib.contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the time inside, unless the part has ended before."""
        began, ended = time.monotonic(), False
        try:
            yield
            ended = True
        finally:
            if not self.seconds.get(f"{part} ended"):
                self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began
                self.seconds[f"{part} ended"] = float(ended)
                self._write()

    def keep(self, name: str, value: float) -> float:
        """The value that was kept under the name, else this one from now on."""
        if name not in self.seconds:
            self.seconds[name] = value
            self._write()
        return self.seconds[name]

    def _write(self) -> None:
        with self._writing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.seconds, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def beside(clock: Clock, part: str, work: Callable[[Any], Any], given: Any, *, at_once: bool) -> Iterator[None]:
    """Do a part's work while the block runs, in a process of its own that prints nothing.

    Args:
        clock: counts its time.
        part: name of it there; nothing is done where it has ended before.
        work: called with `given`.
        given: what can be sent to a process.
        at_once: False: in this process, when the block has ended.
    Raises:
        RunError: the process failed.
    """
    if clock.seconds.get(f"{part} ended") or not at_once:
        yield
        if not clock.seconds.get(f"{part} ended"):
            with clock.running(part):
                work(given)
        return
    process = multiprocessing.get_context("spawn").Process(target=_silently, args=(work, given))
    watcher = threading.Thread(target=_watch, args=(clock, part, process))
    process.start()
    watcher.start()
    try:
        yield
    except BaseException:
        process.terminate()  # it saves
        raise
    finally:
        watcher.join()
    if process.exitcode:
        raise RunError(f"demo: {part} ended with status {process.exitcode}; its run folder has a log.txt")


def _watch(clock: Clock, part: str, process: Any) -> None:
    with contextlib.suppress(RunError), clock.running(part):
        process.join()
        if process.exitcode:
            raise RunError(part)


def _silently(work: Callable[[Any], Any], given: Any) -> None:
    """What the process of `beside` does."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with _one_thread(True):
        work(given)


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Operations of so small a network are slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _take_labelled(data: str, folder: Path, size: Size) -> bool:
    """Copy labelled words of `data` into two sets without a common text; False where there are too few."""
    from rcmstr_fast.data.lmdb_writer import write_lmdb
    from rcmstr_fast.data.source import open_sources
    from rcmstr_fast.data.staging import staged_folder
    from rcmstr_fast.study.words import is_held_out

    source = open_sources([data])
    parts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for start in range(0, len(source), 1024):
        chunk = range(start, min(start + 1024, len(source)))
        for i, label in zip(chunk, source.labels(chunk)):
            if label:
                parts[is_held_out(label)].append((i, label))
    if len(parts[True]) < 8 or len(parts[False]) < 8 * size.scratch_batch:
        return False
    for held_out, name, count in ((True, "held_out", size.held_out), (False, "labelled", size.labelled)):
        if not (folder / name).exists():
            chosen = parts[held_out][:: max(1, len(parts[held_out]) // count)][:count]
            with staged_folder(folder / name) as staged:
                records = ((source.read([i])[0], label) for i, label in chosen)
                write_lmdb(staged / "set", ((image, label) for image, label in records if image is not None))
    return True


def _render(folder: Path, size: Size, *, with_crops: bool) -> None:
    """The rendered sets, each in an LMDB; the texts of `held_out` are in no other set."""
    from rcmstr_fast.study.words import render_set

    sets = {"unlabelled": size.crops if with_crops else 0, "labelled": size.labelled, "held_out": size.held_out}
    for seed, (name, count) in enumerate(sets.items()):
        if count and not (folder / name).exists():
            render_set({**size.words, "count": count, "seed": seed, "held_out": name == "held_out"}, folder / name)


def _pretrain(folder: Path, data: str, size: Size) -> Path:
    from rcmstr_fast.methods import settings
    from rcmstr_fast.train.loop import pretrain

    config = PretrainConfig(run=str(folder), preset="fast", model=ModelConfig(**size.model))
    config.data.roots = [data]
    config.method, config.optim = settings(**size.method), OptimConfig(**size.optim)
    config.train.steps, config.train.global_batch_size = size.pretrain_steps, size.pretrain_batch
    config.train.save_every = 100
    if size.small:
        config.train.tune = "off"  # measuring would take longer than it saves in two minutes
        config.train.precision = "fp32"  # bfloat16 gradients of a small batch point 45 degrees off at first
    return pretrain(config)


def _decoder(folder: Path, title: str, words: Path, size: Size, **fields: Any) -> "ProbeConfig":
    """What the three decoders have in common."""
    from rcmstr_fast.evaluation.config import ProbeConfig

    return ProbeConfig(
        run=str(folder),
        title=title,
        train=[str(words / "labelled")],
        test=[f"held_out={words / 'held_out'}"],
        decoder="ctc",
        augment="none",
        decoder_hidden=size.probe_hidden,
        model=ModelConfig(**size.model),
        **fields,
    )


def _frozen(folder: Path, title: str, source: str, words: Path, size: Size) -> "ProbeConfig":
    return _decoder(
        folder,
        title,
        words,
        size,
        encoder=source,
        normalise=True,
        steps=size.probe_steps,
        eval_every=max(1, size.probe_steps // 5),
        batch_size=size.probe_batch,
        lr=size.probe_lr,
        precision="fp32" if size.small else "auto",
        decoder_threads=int(size.small),
    )


def _scratch(folder: Path, steps: int, words: Path, size: Size) -> "ProbeConfig":
    return _decoder(
        folder, "same network, all trained from scratch", words, size, mode="scratch", encoder="random",
        steps=steps, eval_every=max(1, steps // 5), batch_size=size.scratch_batch, lr=size.scratch_lr,
        precision="fp32" if size.small else "auto", log_every=5,
    )  # fmt: skip


def _scratch_steps(folder: Path, clock: Clock, crops: str, words: Path, size: Size) -> int:
    """Steps from scratch that take as long as pretraining and decoder together, by the speed of a few of each."""
    from rcmstr_fast.evaluation.probe import probe

    if "scratch steps" not in clock.seconds:
        few = min(_TIMED, size.pretrain_steps)
        _pretrain(folder / "pretraining", crops, dataclasses.replace(size, pretrain_steps=few))
        probe(dataclasses.replace(_scratch(folder / "scratch", few, words, size), eval_every=few))
    ahead = size.pretrain_steps * size.pretrain_batch / _speed(folder / "pretraining")
    seconds = ahead + clock.seconds["untrained"]  # the decoder over the untrained encoder takes what the other will
    steps = seconds * _speed(folder / "scratch") / size.scratch_batch
    return int(clock.keep("scratch steps", max(2, int(steps))))


def _speed(folder: Path) -> float:
    """Images/s that a run came to."""
    from rcmstr_fast.study.records import metrics

    return ([line["images_per_s"] for line in metrics(folder) if "images_per_s" in line] or [1.0])[-1]


def _budgets(size: Size, steps: int) -> str:
    return (
        f"Pretraining: {size.method['name']}, {size.pretrain_steps} steps of {size.pretrain_batch} images without labels. "
        f"Decoders: {size.probe_steps} steps of {size.probe_batch} words over the frozen encoders. From scratch: {steps} steps of "
        f"{size.scratch_batch} words, as many as were expected to fit into the time of pretraining and decoder together. "
        "All its layers learn from labels, which are enough by themselves for words as plain as these."
    )


def _table(results: "list[RunResult]", clock: Clock) -> str:
    """Models, the seconds that each had, and what they read of the held-out words."""
    from rcmstr_fast.evaluation.report import markdown

    took = clock.seconds
    seconds = [took["pretraining"] + took["pretrained"], took["untrained"], took["scratch"]]
    found = [result.sets[0] for result in results]
    heads = [f"held_out (N {found[0].score.count}/{found[0].total}) accuracy %", "1-NED %"]
    rows = [
        [result.model, f"{s:.0f}", f"{100 * one.score.accuracy:.2f}", f"{100 * one.score.ned:.2f}"]
        for result, s, one in zip(results, seconds, found)
    ]
    return markdown(["model", "seconds of training", *heads], rows)


def _page(folder: Path, encoder: Path, runs: dict[str, Path], note: str) -> Path:
    """One HTML page of everything, and the learning curve as a picture of its own."""
    from rcmstr_fast import drawing
    from rcmstr_fast.study.page import Runs, write_page
    from rcmstr_fast.study.records import curve, runs_record

    record = runs_record([encoder, *runs.values()])
    record |= {"title": "Demo: what pretraining is worth", "note": note, "metrics": ["accuracy", "ned"]}
    record["evaluations"] = [{"name": "CTC", "decoder": "ctc", "command": "probe"}]
    for row in record["rows"]:
        row["results"] = {"CTC": next(iter(row["results"].values()), {})}
    page = folder / "report.html"
    write_page(record, Runs({"pretraining": encoder}, runs), page)
    lines = {name: curve(run, "val_accuracy") for name, run in runs.items()}
    svg = drawing.curves("Accuracy on validation words", "step of the decoder", "accuracy", lines)
    if svg:
        (folder / "learning.svg").write_text(svg + "\n", encoding="utf-8")
    return page
