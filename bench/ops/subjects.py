"""Which entries are measured at which size: `tiny` in seconds for tests, `cpu` in minutes, `gpu` at training size.

A subject knows the names of its providers before anything is allocated, so that they can be listed and chosen; it is
built when its turn comes, one at a time.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.ops import masked, queue_losses, small
from bench.ops.entry import BOTH, FORWARD, Entry

SIZES = ("tiny", "cpu", "gpu")


@dataclass(frozen=True)
class Subject:
    """An entry that can be built.

    Attributes:
        name: of the operation and what tells its shapes apart.
        build: makes the entry.
        providers: names of those of its providers that are measured.
        modes: of FORWARD and BOTH, those worth timing.
    """

    name: str
    build: Callable[[], Entry]
    providers: tuple[str, ...]
    modes: tuple[str, ...]


_LOSS = ("eager", "compile", "chunk_loop", "chunk_loop_compile", "ours")
_COMPILED = ("eager", "compile", "ours")
#: operation -> names of its providers on every device, and those that only a GPU has
PROVIDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "relational_loss": (_LOSS, ()),
    "relation_kl": (_LOSS, ("liger_jsd_twice",)),
    "five_terms": ((*_LOSS, "chunked"), ("ours, separate", "ours, scheduled")),
    "queue_cross_entropy": (("eager", "compile", queue_losses.OURS_UNCHECKED), tuple(queue_losses.CROSS_ENTROPIES)),
    "hierarchical_pool": (_COMPILED, ()),
    "project_levels": (_COMPILED, ()),
    "draw_masks": (("eager", "ours"), ()),
    "masked_mse": (_COMPILED, ()),
    "replace_tokens": (_COMPILED, ()),
    "enqueue_": (("eager", "ours"), ()),
    "momentum_update_": (("eager", "ours"), ()),
    "masked_pass": (("dense", "sparse"), ()),
}


def _subject(operation: str, shape: str, build: Callable[[], Entry], size: str) -> Subject:
    """A subject with the providers that its size measures: compiling takes too long for `tiny`."""
    everywhere, on_gpu = PROVIDERS[operation]
    names = everywhere + (on_gpu if size == "gpu" else ())
    if size == "tiny":
        names = tuple(name for name in names if "compile" not in name)
    modes = (BOTH,) if operation == "masked_pass" else (FORWARD, BOTH)
    return Subject(f"{operation} {shape}".strip(), build, names, modes)


def subjects(size: str) -> Iterator[Subject]:
    """Every subject of a size of SIZES."""
    if size == "gpu":
        yield from _losses_gpu()
        yield from _small(512, 65536, 47_000_000, size)
        yield from _masked(512, (1.0,), (0.7, 0.5, 0.3, 0.1), (torch.bfloat16,), size)
    elif size == "cpu":
        for keys in (1024, 4096):
            yield _loss("relational_loss", f"frame K={keys}", 26 * 64, keys)
        yield _loss("relational_loss", "word", 64, 1024)
        yield _loss("relation_kl", "f2s", 32 * 64, 1024)
        yield _five(64, 1024, 128, size)
        yield from _small(64, 4096, 3_000_000, size)
        yield from _masked(16, (0.25, 1.0), (0.7, 0.5, 0.3), (torch.float32, torch.bfloat16), size)
    else:
        yield _loss("relational_loss", "frame", 26, 48, size=size)
        yield _loss("relation_kl", "f2s", 32, 48, size=size)
        yield _loss("queue_cross_entropy", "frame", 26, 48, size=size)
        yield _five(2, 48, 64, size)
        yield from _small(2, 64, 40_000, size)
        yield from _masked(2, (0.125,), (0.5,), (torch.float32,), size)


def _device(size: str) -> str:
    return "cuda" if size == "gpu" else "cpu"


def _loss(operation: str, shape: str, rows: int, keys: int, width: int = 128, size: str = "cpu") -> Subject:
    build = {
        "relational_loss": queue_losses.relational_loss,
        "relation_kl": queue_losses.relation_kl,
        "queue_cross_entropy": queue_losses.queue_cross_entropy,
    }[operation]
    return _subject(operation, shape, partial(build, shape, rows, keys, width, _device(size)), size)


def _five(batch: int, keys: int, width: int, size: str) -> Subject:
    build = partial(queue_losses.five_terms, "step", batch, keys, width, _device(size))
    return _subject("five_terms", f"step B={batch}", build, size)


def _losses_gpu() -> Iterator[Subject]:
    keys = 65536
    for batch in (512, 256, 1024):
        yield _five(batch, keys, 128, "gpu")
        yield _loss("relational_loss", f"frame B={batch}", batch * 26, keys, size="gpu")
    for width in (64, 256, 512):
        yield _loss("relational_loss", f"frame D={width}", 13312, keys, width, "gpu")
    yield _loss("relational_loss", "subword", 2048, keys, size="gpu")
    yield _loss("relational_loss", "word", 512, keys, size="gpu")
    yield _loss("relation_kl", "f2s", 16384, keys, size="gpu")
    yield _loss("relation_kl", "s2w", 2048, keys, size="gpu")
    yield _loss("queue_cross_entropy", "frame", 13312, keys, size="gpu")


def _small(batch: int, keys: int, parameters: int, size: str) -> Iterator[Subject]:
    device = _device(size)
    builders = (small.hierarchical_pool, small.project_levels, small.draw_masks, small.masked_mse, small.replace_tokens)
    for build in builders:
        yield _subject(build.__name__, "", partial(build, batch, device), size)
    yield _subject("enqueue_", "", partial(small.enqueue, batch, keys, device), size)
    yield _subject("momentum_update_", "", partial(small.momentum_update, parameters, device), size)


def _masked(
    batch: int, widths: tuple[float, ...], ratios: tuple[float, ...], dtypes: tuple[torch.dtype, ...], size: str
) -> Iterator[Subject]:
    for dtype, width, ratio, stage in itertools.product(dtypes, widths, ratios, masked.STAGES):
        shape = f"{stage} width {width} hidden {ratio} {str(dtype).removeprefix('torch.')}"
        build = partial(masked.masked_pass, stage, width, ratio, batch, dtype, _device(size))
        yield _subject("masked_pass", shape, build, size)
