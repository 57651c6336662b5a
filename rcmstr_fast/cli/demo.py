"""`rcmstr demo`: render words, pretrain, train a decoder three ways, and show what pretraining was worth."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.config import ModelConfig, PretrainConfig

NAME = "demo"
HELP = "the whole way in one command: render words, pretrain, probe, compare; run it again to continue"


@dataclass(frozen=True)
class Size:
    """How large a demo is.

    Attributes:
        crops: rendered words to pretrain on.
        labelled: rendered words with labels for the decoders.
        held_out: rendered words of the test; their texts are in no other set.
        width: width of ResNet-29.
        queue_size: rows of each queue.
        pretrain_steps: steps of the pretraining.
        pretrain_batch: images a step of it.
        momentum: of the key encoder; short runs need a faster one.
        lr: of the pretraining.
        probe_steps: steps of the decoders of frozen encoders.
        scratch_steps: steps of the network that is trained from scratch; each costs several times as much.
        probe_batch: words a step of it.
        probe_lr: of each decoder.
        probe_hidden: LSTM units a direction of each decoder.
        longest: most characters of a rendered word.
        digits: dark words of digits alone, in few fonts and with few effects: what a small decoder learns in minutes.
    """

    crops: int
    labelled: int
    held_out: int
    width: float
    queue_size: int
    pretrain_steps: int
    pretrain_batch: int
    momentum: float
    lr: float
    probe_steps: int
    scratch_steps: int
    probe_batch: int
    probe_lr: float
    probe_hidden: int
    longest: int
    digits: bool


LAPTOP = Size(10_000, 10_000, 1_000, 0.25, 4096, 110, 64, 0.98, 2e-3, 4_000, 160, 32, 3e-3, 64, 4, True)
GPU = Size(200_000, 50_000, 3_000, 1.0, 65_536, 4_000, 256, 0.999, 3e-4, 4_000, 4_000, 256, 1e-3, 256, 25, False)
#: Few and mild effects and few fonts, for Size.digits.
MILD = {
    "colour": 0.0, "rotation": 0.1, "perspective": 0.1, "curve": 0.0, "outline": 0.0, "shadow": 0.0, "shading": 0.0, "texture": 0.0,
    "clutter": 0.0, "lighting": 0.1, "fade": 0.0, "blur": 0.1, "motion": 0.0, "low_resolution": 0.1, "noise": 0.2,
    "spacing": 0.0, "stretch": 0.2,
}  # fmt: skip
FAMILIES = ["DejaVu Sans"]


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, and optionally what on."""
    parser.add_argument("--run", type=str, default="runs/demo", help="folder for everything the demo makes")
    parser.add_argument(
        "--data", type=str, default="",
        help="your own word crops to pretrain on (LMDB or folder of images); rendered words if not given",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=str, default="auto", choices=["auto", "laptop", "gpu"], help="auto: gpu where CUDA works"
    )


def run(arguments: Namespace) -> int:
    """Render, pretrain, probe three times, print one table and where the pictures are."""
    from rcmstr_fast.evaluation.report import comparison_table
    from rcmstr_fast.train.distributed import choose_device

    cuda = choose_device("auto", 0).type == "cuda"
    size = {"auto": GPU if cuda else LAPTOP, "laptop": LAPTOP, "gpu": GPU}[arguments.size]
    folder = Path(arguments.run)
    words = folder / "words"
    own = bool(arguments.data) and _take_labelled(arguments.data, words, size)
    if not own:
        _render(words, size, with_crops=not arguments.data)
    encoder = _pretrain(folder / "pretrain", arguments.data or str(words / "unlabelled"), size)
    results = [
        _probe(folder / name, title, mode, source, encoder, words, size)
        for name, title, mode, source in (
            ("probe_pretrained", "pretrained encoder, frozen", "frozen", str(encoder)),
            ("probe_untrained", "untrained encoder, frozen", "frozen", "random"),
            ("scratch", "same network, all trained from scratch", "scratch", "random"),
        )
    ]
    table = comparison_table(results) + "\n\n" + comparison_table(results, "ned")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(
        f"\n{table}\n\nDecoders: {size.probe_steps} steps of {size.probe_batch} words over the frozen encoders, "
        f"{size.scratch_steps} from scratch. Pretraining: {size.pretrain_steps} steps of {size.pretrain_batch} images."
    )
    if own:
        print("Pretraining has seen the held-out images too, but no labels.")
    elif arguments.data:
        print(f"{arguments.data} has too few labelled words for decoders: rendered words served instead.")
    print(f"run folder: {folder}")
    pictures = [words / "held_out" / "samples.png", encoder / "views.png", folder / "probe_pretrained/predictions.png"]
    print("\n".join(f"  {picture}" for picture in pictures if picture.is_file()))
    return 0


def _is_held_out(text: str) -> bool:
    """A tenth of all texts, always the same ones."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def _take_labelled(data: str, folder: Path, size: Size) -> bool:
    """Copy labelled words of `data` into two sets without a common text; False where there are too few."""
    from rcmstr_fast.data.lmdb_writer import write_lmdb
    from rcmstr_fast.data.source import open_sources
    from rcmstr_fast.data.staging import staged_folder

    source = open_sources([data])
    parts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for start in range(0, len(source), 1024):
        chunk = range(start, min(start + 1024, len(source)))
        for i, label in zip(chunk, source.labels(chunk)):
            if label:
                parts[_is_held_out(label)].append((i, label))
    if len(parts[True]) < 8 or len(parts[False]) < 8 * size.probe_batch:
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
    from rcmstr_fast.data.synth import Effects, SynthConfig, render_lmdb
    from rcmstr_fast.data.synth.words import read_words

    folder.mkdir(parents=True, exist_ok=True)
    if size.digits:
        vocabulary = [f"{number:0{length}}" for length in range(2, size.longest + 1) for number in range(10**length)]
    else:
        vocabulary = read_words(SynthConfig(num_words=30_000))
    lists: dict[bool, list[str]] = {True: [], False: []}
    for word in vocabulary:
        lists[_is_held_out(word)].append(word)
    for held_out, name in ((True, "held_out.txt"), (False, "training.txt")):
        (folder / name).write_text("\n".join(lists[held_out]), encoding="utf-8")
    sets = {"unlabelled": size.crops if with_crops else 0, "labelled": size.labelled, "held_out": size.held_out}
    for seed, (name, count) in enumerate(sets.items()):
        if count:
            texts = folder / ("held_out.txt" if name == "held_out" else "training.txt")
            config = SynthConfig(out=str(folder / name), count=count, seed=seed, words=str(texts))
            if size.digits or name == "held_out":  # only listed words, as they are
                config.numbers = config.random_text = config.punctuation = 0.0
            if size.digits:
                config.effects, config.families = Effects(**MILD), FAMILIES
            render_lmdb(config)


def _pretrain(folder: Path, data: str, size: Size) -> Path:
    from rcmstr_fast.methods import settings
    from rcmstr_fast.train.loop import pretrain

    config = PretrainConfig(run=str(folder), model=ModelConfig(width=size.width))
    config.data.roots = [data]
    config.preset = "fast"  # the weight of the terms between levels that the demonstration was measured with
    config.method = settings("rcmstr", queue_size=size.queue_size, momentum=size.momentum)
    config.optim.lr = size.lr
    config.train.steps, config.train.global_batch_size = size.pretrain_steps, size.pretrain_batch
    config.train.save_every = 50
    if size is LAPTOP:  # bfloat16 gradients of a small batch point 45 degrees off at first, and the run is short
        config.train.precision = "fp32"
    return pretrain(config)


def _probe(folder: Path, title: str, mode: str, source: str, like: Path, words: Path, size: Size) -> object:
    from rcmstr_fast.evaluation.config import ProbeConfig
    from rcmstr_fast.evaluation.probe import probe

    steps = size.scratch_steps if mode == "scratch" else size.probe_steps
    small = mode == "frozen" and size is LAPTOP  # so small a decoder is fastest in plain float32 on one thread

    config = ProbeConfig(
        run=str(folder), title=title, mode=mode, encoder=source, like=str(like) if source == "random" else "",
        train=[str(words / "labelled")], test=[f"held_out={words / 'held_out'}"], augment="none",
        steps=steps, eval_every=max(1, steps // 5), batch_size=size.probe_batch,
        lr=size.probe_lr, decoder_hidden=size.probe_hidden, normalise=mode == "frozen",
        precision="fp32" if small else "auto", decoder_threads=int(small),
    )  # fmt: skip
    return probe(config)
