"""Peers of the stages of the data path, timed in turn with ours: `rcmstr bench pipeline --peers true`.

A peer whose results are off is reported as FAIL and not timed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from bench import augment_peers
from rcmstr_fast import env, ops
from rcmstr_fast.data.source import LmdbSet
from rcmstr_fast.ops.augment_views import AugmentPreset, parameters, reference
from rcmstr_fast.train.throughput import Rate, Sample, decode_run, interleaved, read_run, wait

#: Pictures of one call of the peers that take milliseconds for each.
_FEW = 24
_VIEWS = 2


def peers(sample: Sample, repetitions: int) -> list[dict[str, Any]]:
    """Rows of stage, provider, images_per_s, per_core and, against the first provider of the stage, `ours_is`."""
    with ExitStack() as stack:
        return [
            *_rows("read", interleaved(_readers(sample), repetitions)),
            *_rows("decode", interleaved(_decoders(sample, stack), repetitions)),
            *_augmentation(sample, repetitions),
        ]


def _rows(stage: str, rates: dict[str, Rate]) -> list[dict[str, Any]]:
    ours = next(iter(rates.values()))
    return [
        {
            "stage": stage, "provider": name, "status": "ok", "images_per_s": rate.images_per_s,
            "per_core": rate.per_core, "ours_is": ours.images_per_s / rate.images_per_s,
            "ours_is_per_core": ours.per_core / rate.per_core,
        }
        for name, rate in rates.items()
    ]  # fmt: skip


def _readers(sample: Sample) -> dict[str, Callable[[], int]]:
    found: dict[str, Callable[[], int]] = {"ours": read_run(sample)}
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


def _decoders(sample: Sample, stack: ExitStack) -> dict[str, Callable[[], int]]:
    names = ["pillow"]
    try:
        import nvidia.dali  # noqa: F401

        names += ["dali", "dali_mixed"] if torch.cuda.is_available() else ["dali"]
    except ImportError:
        pass
    return {name: decode_run(sample, stack, name) for name in names}


def _augmentation(sample: Sample, repetitions: int) -> list[dict[str, Any]]:
    """Views of the same pictures with the same parameters; rates are pictures, each in two views and permuted."""
    count = len(sample.batches[0])
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 20, generator=generator)
    smooth = torch.nn.functional.interpolate(small, sample.size, mode="bicubic").clamp(0, 1) * 255
    images = smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(sample.device)
    index = torch.arange(count)
    order = ops.draw_order(index, seed=0, epoch=0, num_patches=2, group_size=2).to(sample.device)
    rows = torch.stack([parameters.draw_parameters(index, seed=0, epoch=0, view=view) for view in range(_VIEWS)])
    keys: dict[str, Any] = {"seed": 0, "epoch": 0, "num_views": _VIEWS, "size": sample.size}

    def ours() -> int:
        ops.augment_views(images, index=index, order=order, **keys)
        wait(sample.device)
        return count

    def on_host(one: Callable[[int, int], Any]) -> Callable[[], int]:
        few = min(_FEW, count)

        def run() -> int:
            made = [[one(view, i) for i in range(few)] for view in range(_VIEWS)]
            np.stack([np.stack(view) for view in made])
            return few

        return run

    pictures, drawn = images.cpu().numpy(), rows.numpy()
    chain = on_host(lambda view, i: augment_peers.augment_image(pictures[i], drawn[view, i]))
    runs = {"ours": ours, "numpy, scipy, pillow": chain}
    failed = [] if _agrees(pictures[:4], drawn[0, :4]) else [runs.popitem()[0]]
    try:
        from rcmstr_fast.ops.augment_views.dali import DaliViews

        dali = DaliViews(
            batch=_VIEWS * count, threads=sample.config.data.workers or env.threads(), device=sample.device
        )

        def with_dali() -> int:
            dali(images, index=index, order=order, **keys)
            wait(sample.device)
            return count

        runs["dali, fixed order, no piecewise affine"] = with_dali
    except ImportError:
        pass
    rates = _rows("augment", interleaved(runs, repetitions))
    rates += [{"stage": "augment", "provider": name, "status": "FAIL"} for name in failed]
    return rates + (_on_device(sample, rates[0]["images_per_s"]) if sample.device.type == "cuda" else [])


def _on_device(sample: Sample, by_the_clock: float, count: int = 512, repetitions: int = 50) -> list[dict[str, Any]]:
    """Time of `augment_views` on the GPU alone: two views and the permuted one of 512 images that lie there, bfloat16.

    A call by the clock also counts the launches and the waiting; here the GPU is kept busy until all are queued.
    """
    images = torch.randint(0, 256, (count, *sample.size, 3), dtype=torch.uint8, device=sample.device)
    index = torch.arange(count, device=sample.device)
    order = ops.draw_order(index, seed=0, epoch=0, num_patches=2, group_size=2)
    times = []
    for epoch in range(repetitions + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        begin.record()
        ops.augment_views(
            images, seed=0, epoch=epoch, index=index, num_views=_VIEWS, size=sample.size, order=order,
            dtype=torch.bfloat16,
        )  # fmt: skip
        end.record()
        wait(sample.device)
        times.append(begin.elapsed_time(end))
    low, median, high = np.quantile(times[5:], (0.2, 0.5, 0.8)).tolist()
    rate = count / median * 1e3
    return [
        {
            "stage": "augment", "provider": f"ours, the GPU's time alone, {count} images", "status": "ok",
            "images_per_s": rate, "per_core": 0.0, "ours_is": by_the_clock / rate, "ours_is_per_core": 0.0,
            "ms": median, "ms_20": low, "ms_80": high,
        }
    ]  # fmt: skip


def _agrees(pictures: np.ndarray, rows: np.ndarray) -> bool:
    """Whether each operation of the SciPy chain is the reference's to a grey level on average."""
    for name in AugmentPreset().names:
        chosen = parameters.only(torch.from_numpy(rows), name)
        expected = reference.apply_parameters(torch.from_numpy(pictures), chosen[None])[0].permute(0, 2, 3, 1).numpy()
        made = np.stack([augment_peers.augment_image(p, r) for p, r in zip(pictures, chosen.numpy(), strict=True)])
        if np.abs(made - expected).mean() > 1 / 127.5:
            return False
    return True
