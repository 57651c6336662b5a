"""Peers of the stages of the data path: `rcmstr bench pipeline --peers true`, and `pytest bench --benchmark-only`.

Each stage has its providers by name, ours first; a provider is a call that returns how many pictures it has done. One
whose results are off has no call but a reason.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from bench.data import chain
from rcmstr_fast import env, ops, timer
from rcmstr_fast.data.source import LmdbSet
from rcmstr_fast.measure.pipeline import Rate, Sample, decode_run, interleaved, read_run, wait
from rcmstr_fast.measure.records import Row
from rcmstr_fast.measure.running import smooth_pictures
from rcmstr_fast.ops.augment_views import AugmentPreset, parameters, reference

#: Pictures of one call of the peers that take milliseconds for each.
_FEW = 24
_VIEWS = 2
#: A provider's call, or why it is not timed.
Call = Callable[[], int] | str
#: stage -> names of the providers that may be there, ours first
PROVIDERS = {
    "read": ("ours", "lmdb package, a transaction a batch", "lmdb package, a transaction a record"),
    "decode": ("pillow", "dali", "dali_mixed"),
    "augment": ("ours", "numpy, scipy, pillow", "dali, fixed order, no piecewise affine"),
}


def calls(stage: str, sample: Sample, stack: ExitStack) -> dict[str, Call]:
    """The providers of a stage that this machine has; `stack` ends their threads."""
    if stage == "read":
        return _readers(sample)
    return _decoders(sample, stack) if stage == "decode" else _augmentation(sample)


def peers(sample: Sample, repetitions: int) -> list[Row]:
    """Rows of stage, provider, images_per_s, per_core and, against the first provider of the stage, `ours_is`."""
    found = []
    for stage in PROVIDERS:
        with ExitStack() as stack:
            made = calls(stage, sample, stack)
            runs = {name: call for name, call in made.items() if not isinstance(call, str)}
            found += _rows(stage, interleaved(runs, repetitions))
            found += [_head(stage, name) | {"status": call} for name, call in made.items() if isinstance(call, str)]
    if sample.device.type == "cuda":
        found.append(_on_device(sample))
    return found


def _head(stage: str, name: str) -> Row:
    return {"group": "data", "stage": stage, "provider": name}


def _rows(stage: str, rates: dict[str, Rate]) -> list[Row]:
    ours = next(iter(rates.values()))
    return [
        _head(stage, name)
        | {
            "status": "ok",
            "images_per_s": rate.images_per_s,
            "per_core": rate.per_core,
            "ours_is": ours.images_per_s / rate.images_per_s,
            "ours_is_per_core": ours.per_core / rate.per_core,
        }
        for name, rate in rates.items()
    ]


def _readers(sample: Sample) -> dict[str, Call]:
    found: dict[str, Call] = {"ours": read_run(sample)}
    if len(sample.source.sets) != 1 or not isinstance(sample.source.sets[0], LmdbSet):
        return found  # the peers read one LMDB
    import lmdb

    path = sample.source.sets[0].path
    environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)

    def a_record() -> int:
        count = 0
        for records in sample.batches:
            for record in records:
                with environment.begin() as transaction:
                    count += transaction.get(b"image-%09d" % (record + 1)) is not None
        return count

    def a_batch() -> int:
        count = 0
        for records in sample.batches:
            with environment.begin() as transaction:
                count += len([transaction.get(b"image-%09d" % (record + 1)) for record in records])
        return count

    return found | {"lmdb package, a transaction a batch": a_batch, "lmdb package, a transaction a record": a_record}


def _decoders(sample: Sample, stack: ExitStack) -> dict[str, Call]:
    names = ["pillow"]
    try:
        import nvidia.dali  # noqa: F401

        names += ["dali", "dali_mixed"] if torch.cuda.is_available() else ["dali"]
    except ImportError:
        pass
    return {name: decode_run(sample, stack, name) for name in names}


def _augmentation(sample: Sample) -> dict[str, Call]:
    """Views of the same pictures with the same parameters; a call does pictures, each in two views and permuted."""
    count = len(sample.batches[0])
    images = smooth_pictures(count, sample.size, seed=0).to(sample.device)
    index = torch.arange(count)
    order = ops.draw_order(index, seed=0, epoch=0, num_patches=2, group_size=2).to(sample.device)
    keys: dict[str, Any] = {"seed": 0, "epoch": 0, "num_views": _VIEWS, "size": sample.size}

    def ours() -> int:
        ops.augment_views(images, index=index, order=order, **keys)
        wait(sample.device)
        return count

    return {"ours": ours, "numpy, scipy, pillow": _chain(images)} | _dali(sample, images, order, keys)


def _chain(images: torch.Tensor) -> Call:
    """The published chain on the host, one picture after the other; it must be the reference's to a grey level."""
    count = len(images)
    index = torch.arange(count)
    drawn = [parameters.draw_parameters(index, seed=0, epoch=0, view=view).numpy() for view in range(_VIEWS)]
    pictures, few = images.cpu().numpy(), min(_FEW, count)
    if not _agrees(pictures[:4], drawn[0][:4]):
        return "FAIL"

    def run() -> int:
        made = [[chain.augment_image(pictures[i], rows[i]) for i in range(few)] for rows in drawn]
        np.stack([np.stack(view) for view in made])
        return few

    return run


def _dali(sample: Sample, images: torch.Tensor, order: torch.Tensor, keys: dict[str, Any]) -> dict[str, Call]:
    try:
        from rcmstr_fast.ops.augment_views.dali import DaliViews
    except ImportError:
        return {}
    count, index = len(images), torch.arange(len(images))
    threads = sample.config.data.workers or env.threads()
    dali = DaliViews(batch=_VIEWS * count, threads=threads, device=sample.device)

    def run() -> int:
        dali(images, index=index, order=order, **keys)
        wait(sample.device)
        return count

    return {"dali, fixed order, no piecewise affine": run}


def _on_device(sample: Sample, count: int = 512, rounds: int = 50) -> Row:
    """Time of `augment_views` on the GPU alone: two views and the permuted one of 512 images that lie there, bfloat16.

    A call by the clock also counts the launches and the waiting; here the GPU is kept busy until all are queued.
    """
    images = torch.randint(0, 256, (count, *sample.size, 3), dtype=torch.uint8, device=sample.device)
    index = torch.arange(count, device=sample.device)
    order = ops.draw_order(index, seed=0, epoch=0, num_patches=2, group_size=2)
    keys: dict[str, Any] = {"seed": 0, "epoch": 0, "num_views": _VIEWS, "size": sample.size}

    def run() -> None:
        ops.augment_views(images, index=index, order=order, dtype=torch.bfloat16, **keys)

    times = timer.measure(run, sample.device, rounds=rounds, warm_up=5, cold=True)
    head = _head("augment", f"ours, the GPU's time alone, {count} images")
    return head | {"status": "ok", "images_per_s": 1e3 * count / times.median, "per_core": 0.0} | times.row()


def _agrees(pictures: np.ndarray, rows: np.ndarray) -> bool:
    """Whether each operation of the SciPy chain is the reference's to a grey level on average."""
    for name in AugmentPreset().names:
        chosen = parameters.only(torch.from_numpy(rows), name)
        expected = reference.apply_parameters(torch.from_numpy(pictures), chosen[None])[0].permute(0, 2, 3, 1).numpy()
        made = np.stack([chain.augment_image(p, r) for p, r in zip(pictures, chosen.numpy(), strict=True)])
        if np.abs(made - expected).mean() > 1 / 127.5:
            return False
    return True
