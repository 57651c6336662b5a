"""Loader: the same samples for any division, exact resume, replaced broken records, clean ends."""

import io
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.loader import Loader
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import ImageSource, open_sources

COUNT = 50


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 10), (i, 2 * i, 255 - i)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> ImageSource:
    folder = tmp_path_factory.mktemp("sound")
    write_lmdb(folder, ((picture(i), None) for i in range(COUNT)))
    return open_sources([folder])


@pytest.fixture
def broken(tmp_path) -> ImageSource:
    """Every third record is broken, each in one of three ways."""
    bad = [b"", b"nothing", picture(0)[:40]]
    write_lmdb(tmp_path, ((bad[i // 3 % 3] if i % 3 == 0 else picture(i), None) for i in range(COUNT)))
    return open_sources([tmp_path])


def loader(source: ImageSource, local_batch: int = 4, seed: int = 0, **options) -> Loader:
    order = options.pop("order", None) or EpochOrder(source.sizes, seed=seed)
    data = DataConfig(workers=2, prefetch=options.pop("prefetch", 2))
    return Loader(source, order, height=8, width=16, data=data, local_batch=local_batch, **options)


def slots(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def test_images_belong_to_their_records(sound):
    shown = list(loader(sound, local_batch=8).batches(0))
    assert len(shown) == COUNT // 8
    for batch in shown:
        assert batch.images.shape == (8, 8, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.index.dtype == batch.records.dtype == torch.int64
        assert (
            batch.images == torch.stack([torch.tensor([i, 2 * i, 255 - i]) for i in batch.records])[:, None, None]
        ).all()
        assert batch.views is None
    seen = torch.cat([batch.records for batch in shown])
    assert seen.unique().numel() == 48


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 3), (4, 3)])
def test_any_division_shows_the_same_global_batches(sound, world, accumulate):
    total, epoch = 12, 1
    expected = slots(loader(sound, total).batches(epoch))
    local = total // (world * accumulate)
    parts = [
        slots(loader(sound, local, rank=rank, world_size=world, accumulate=accumulate).batches(epoch))
        for rank in range(world)
    ]
    assert all(len(part) == len(expected) * accumulate for part in parts)
    for step, batch in enumerate(expected):
        micros = range(step * accumulate, (step + 1) * accumulate)
        assert [slot for micro in micros for part in parts for slot in part[micro]] == batch


def test_resume_reads_exactly_the_rest(broken):
    whole = list(loader(broken, accumulate=2).batches(2))
    rest = list(loader(broken, accumulate=2).batches(2, step=3))
    assert len(rest) == len(whole) - 6
    for a, b in zip(whole[6:], rest):
        assert torch.equal(a.index, b.index) and torch.equal(a.records, b.records) and torch.equal(a.images, b.images)
    assert list(loader(broken).batches(0, step=12)) == []


def test_broken_records_are_replaced_named_and_logged_once(broken, caplog):
    with caplog.at_level(logging.WARNING):
        made = loader(broken, 10)
        for epoch in range(2):
            for batch in made.batches(epoch):
                assert (batch.records % 3 != 0).all()
                assert (batch.images[:, 0, 0, 0] == batch.records).all()
    names = {broken.name(i) for i in range(0, COUNT, 3)}
    assert set(made.broken) == names
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"broken record {name}: {reason}" for name, reason in made.broken.items()
    )
    assert made.broken[broken.name(0)] == "zero bytes"
    assert made.broken[broken.name(3)] == "not a picture (7 bytes)"


def test_replacement_does_not_depend_on_the_division(broken):
    whole = torch.cat([batch.records for batch in loader(broken, 10).batches(0)])
    halves = [[batch.records for batch in loader(broken, 5, rank=rank, world_size=2).batches(0)] for rank in range(2)]
    assert torch.equal(torch.cat([part for pair in zip(*halves) for part in pair]), whole)


def test_replacements_come_from_the_same_weighted_root(tmp_path):
    write_lmdb(tmp_path / "a", ((picture(i) if i % 2 else b"", None) for i in range(20)))
    write_lmdb(tmp_path / "b", ((picture(i), None) for i in range(20)))
    source = open_sources([tmp_path / "a", tmp_path / "b"])
    order = EpochOrder(source.sizes, [3, 1], 40)
    batches = loader(source, 10, order=order).batches(0)
    assert sum(int((batch.records < 20).sum()) for batch in batches) == 30


def test_nothing_usable_is_an_error(tmp_path):
    write_lmdb(tmp_path, [(b"nothing", None)] * 8)
    with pytest.raises(ConfigError, match=r"got 100 broken records in a row in the place of .*not a picture"):
        next(loader(open_sources([tmp_path])).batches(0))


def test_transform_runs_in_the_background(sound):
    threads = set()

    def transform(images, index, epoch):
        threads.add(threading.current_thread().name)
        return images.sum(), index, epoch

    for batch in loader(sound, transform=transform).batches(3):
        assert batch.views[0] == batch.images.sum() and torch.equal(batch.views[1], batch.index)
        assert batch.views[2] == 3
    assert threads and all(name.startswith("batch") for name in threads)


def running() -> int:
    return sum(thread.name.startswith(("ahead", "batch", "decode")) for thread in threading.enumerate())


def test_every_record_is_announced_before_it_is_read(sound, monkeypatch):
    told: list[int] = []
    read = sound.read

    def reads(indices):
        assert set(np.asarray(indices).tolist()) <= set(told)
        return read(indices)

    monkeypatch.setattr(sound, "prefetch", lambda records: told.extend(records.tolist()))
    monkeypatch.setattr(sound, "read", reads)
    shown = torch.cat([batch.records for batch in loader(sound).batches(0)]).tolist()
    assert told == shown and len(shown) == 48


def test_prefetch_is_bounded_and_closing_ends_the_threads(sound):
    made = []
    batches = loader(sound, 2, prefetch=3, transform=lambda images, index, epoch: made.append(1)).batches(0)
    next(batches)
    time.sleep(0.2)
    assert 1 <= len(made) <= 4
    batches.close()
    assert running() == 0
    assert len(made) <= 4


def test_an_exception_reaches_the_consumer_and_ends_the_threads(sound):
    def transform(images, index, epoch):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        list(loader(sound, transform=transform).batches(0))
    assert running() == 0


def test_waiting_is_counted(sound):
    made = loader(sound, 25, transform=lambda *_: time.sleep(0.05))
    list(made.batches(0))
    assert 0.05 <= made.waited < 5


def test_interpreter_exit_in_the_middle_of_an_epoch(sound):
    code = (
        "import sys\n"
        "from rcmstr_fast.config import DataConfig\n"
        "from rcmstr_fast.data import loader, sampler, source\n"
        "found = source.open_sources(sys.argv[1:])\n"
        "order = sampler.EpochOrder(found.sizes)\n"
        "made = loader.Loader(found, order, height=8, width=16, data=DataConfig(), local_batch=1)\n"
        "batches = made.batches(0)\n"
        "print(next(batches).images.shape[0])\n"
    )
    command = [sys.executable, "-c", code, sound.root_names[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n" and done.stderr == ""


def test_wrong_sizes(sound):
    with pytest.raises(ConfigError, match=r"one global batch of 96 images, got an epoch of 50"):
        loader(sound, 8, world_size=4, accumulate=3)
    with pytest.raises(ConfigError, match="prefetch 1 or more, got 2 and 0"):
        loader(sound, prefetch=0)
    with pytest.raises(ValueError, match="over the 50 records, got one over 9"):
        loader(sound, order=EpochOrder([9]))
