"""Text segmentation: a head over a frozen, fine-tuned or untrained encoder, trained, tested and reported."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import rcmstr_fast
from rcmstr_fast import env
from rcmstr_fast.data.table import to_tsv
from rcmstr_fast.evaluation.assemble import build_base, rotation
from rcmstr_fast.evaluation.config import SegmentConfig, check_segment
from rcmstr_fast.evaluation.decoder_data import Words, ahead
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.over_encoder import Precision
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.reading import gather_objects, progress
from rcmstr_fast.evaluation.running import Run, evaluate, words_of
from rcmstr_fast.evaluation.segment_data import PairFeed, PairImages, Pairs, open_segment_data
from rcmstr_fast.evaluation.segment_report import (
    Segmented,
    SegmentResult,
    SegmentSet,
    load_segment_result,
    overlaps,
    score_masks,
    segment_table,
    write_segment_results,
)
from rcmstr_fast.evaluation.segmenter import Segmenter
from rcmstr_fast.evaluation.testing import parse_test_sets
from rcmstr_fast.train.checkpoint import write_text
from rcmstr_fast.train.commit import commit
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.runfolder import RunFolder

#: Fields that only a segmentation's configuration has.
_FIELDS = {"blocks", "heads", "dim", "encoder"}
_SHOWN = 12

_log = logging.getLogger(__name__)


def segment(config: SegmentConfig, world: World | None = None) -> SegmentResult:
    """Train the head (and, by mode, the encoder) and test it with the best validation's weights.

    An interrupted run is continued, of a finished one the results are read back.

    Args:
        config: of `rcmstr segment`.
        world: the processes, which work on each step together; None: those that torchrun started are joined.
    Returns:
        The results, as in results.json of the run folder.
    Raises:
        ConfigError: a wrong value, missing or unusable files or data.
        RunError: a signal, a full disk, or a loss that is not finite.
    """
    check_segment(config)
    tests = parse_test_sets(config.test)
    return evaluate(config, _FIELDS, load_segment_result, lambda run, log: _run(run, log, tests), world)


def build_segmenter(config: SegmentConfig, precision: Precision = "fp32") -> Segmenter:
    """The untrained head on the encoder that the configuration names; its weights depend on `config.seed` alone.

    Raises:
        ConfigError: the encoder cannot be read or built.
    """
    with torch.random.fork_rng():
        encoder, rectifier, model = build_base(config)
        torch.manual_seed(config.seed)
        made = Segmenter(
            model,
            encoder,
            blocks=config.blocks,
            heads=config.heads,
            dim=config.dim,
            frozen=config.mode == "frozen",
            precision=precision,
        )
    if not isinstance(rectifier, torch.nn.Identity):
        _log.info("the encoder's rectifier is left out: it would move pixels away from their places in the mask")
    made.rotate = rotation(config)
    return made


def _run(run: Run[SegmentConfig], log: RunLog, tests: dict[str, str]) -> SegmentResult:
    config, folder, world = run.config, run.folder, run.world
    data = open_segment_data(config, tests)
    network = build_segmenter(config, run.precision)
    height, width = network.size
    with ThreadPoolExecutor(config.workers or env.threads()) as pool:

        def feed(pairs: Words, preset: str, limit_gib: float) -> PairFeed:
            images = PairImages(pairs, network.size, pool, limit_gib, network.rotate)
            return PairFeed(network, images, world, preset=preset, seed=config.seed)

        fit = run.train(
            network,
            data,
            feed,
            lambda val: _validated(network, val, config.batch_size, world),
            log,
            [f"segmentation by {config.blocks} blocks of {config.dim} channels at {height} x {width} pixels"],
        )
        result, shown = SegmentResult(run.title, [], {}), []
        for name, pairs in data.tests.items():
            found, some = _tested(name, feed(pairs, "none", 0.0), network, config, folder, world)
            result.sets.append(found)
            shown += some
    result.info.update(_info(run, network, data, fit))
    world.on_rank0(lambda: _write(folder, network, result, shown))
    _log.info("results\n%s", segment_table(result), extra={"file_only": True})
    return result


def _write(folder: RunFolder, network: Segmenter, result: SegmentResult, shown: list[Segmented]) -> None:
    network.save(folder.path / "segmenter.safetensors", result.info)
    write_segment_results(folder.path, result, shown[: 2 * _SHOWN])


def count_pixels(
    network: Segmenter, feed: PairFeed, batch_size: int, what: str, world: World
) -> tuple[np.ndarray, set[int]]:
    """`overlaps` of every picture of a feed, [n, 3] int64, and the positions of those that cannot be decoded.

    All processes must call this, each works on its share, and all get everything; a broken picture has a true mask
    of nothing and counts as it is predicted.
    """
    network.eval()
    counts = np.zeros((len(feed), 3), np.int64)
    batches = feed.own_batches(batch_size)
    with torch.no_grad():
        for positions, loaded in progress(ahead(feed.load, batches), len(batches), what):
            predicted = network.masks(feed.frames(positions, loaded, 0, positions))
            truth = feed.targets(positions, loaded, 0, positions, range(len(positions))) > 0
            counts[positions] = overlaps(predicted.cpu().numpy(), truth.cpu().numpy())
    broken = set(feed.images.broken)
    everyone = gather_objects(world, (counts, broken))
    return np.sum([own for own, _ in everyone], axis=0), set().union(*(own for _, own in everyone))


def _validated(network: Segmenter, val: PairFeed, batch_size: int, world: World) -> dict[str, float]:
    """Foreground IoU and mean IoU over the validation pictures."""
    found = score_masks(count_pixels(network, val, batch_size, "validation", world)[0])
    return {"iou": found.iou, "mean_iou": found.mean_iou}


def _tested(
    name: str, feed: PairFeed, network: Segmenter, config: SegmentConfig, folder: RunFolder, world: World
) -> tuple[SegmentSet, list[Segmented]]:
    """Segment one test set, write predictions/NAME.tsv, and choose a few pictures to show."""
    counts, broken = count_pixels(network, feed, config.batch_size, name, world)
    pairs = feed.images.words
    assert isinstance(pairs, Pairs)
    each = [score_masks(row[None]) for row in counts]
    rows = [[pairs.name(i), pairs.labels[i], f"{one.iou:.4f}", f"{one.mean_iou:.4f}"] for i, one in enumerate(each)]
    text = to_tsv([["name", "text", "iou", "mean_iou"], *rows])
    path = folder.path / "predictions" / f"{name}.tsv"

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        write_text(path, text, "surrogateescape")

    world.on_rank0(write)
    if broken:
        _log.warning("test %s: %d pictures or masks became unreadable", name, len(broken))
    result = SegmentSet(name, pairs.total, dict(pairs.dropped), score_masks(counts))
    if world.rank:
        return result, []
    by_iou = np.argsort([one.iou for one in each], kind="stable")
    chosen = by_iou[np.unique(np.linspace(0, len(by_iou) - 1, min(_SHOWN, len(by_iou))).round().astype(int))]
    loaded = feed.images.get(chosen)
    with torch.no_grad():
        predicted = network.masks(feed.frames(chosen, loaded, 0, chosen)).cpu().numpy()
    return result, [
        Segmented(name, pixels[..., :3], pixels[..., 3] > 0, mask, each[i].iou)
        for pixels, mask, i in zip(loaded, predicted, chosen)
    ]


def _info(run: Run[SegmentConfig], network: Segmenter, data: ProbeData, fit: Fit) -> dict[str, Any]:
    """Facts kept beside the results and in the network's file."""
    config = run.config
    assert fit.best is not None
    return {
        "mode": config.mode,
        "encoder": config.encoder or "random",
        "encoder_digest": run.digest,
        "arch": network.model.encoder,
        "size": list(network.size),
        "precision": network.precision,
        "seed": config.seed,
        "subset": config.subset,
        "words": words_of(data),
        "steps": fit.schedule.total_steps,
        "batch_size": fit.schedule.batch_size,
        "best_step": fit.best["step"],
        "val_iou": fit.best["iou"],
        "version": rcmstr_fast.__version__,
        "commit": commit(),
    }
