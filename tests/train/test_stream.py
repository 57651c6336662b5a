"""The trainer's data: the same pixels after a restart, disjoint ranks that together are the epoch."""

import sys
import threading
from itertools import islice

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.config import ConfigError, DataConfig, PretrainConfig, resolve
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.methods import Batch, find
from rcmstr_fast.methods.permutation import permuted_order
from rcmstr_fast.train import stream as stream_module
from rcmstr_fast.train import views
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.plan import make_plan
from rcmstr_fast.train.stream import Stream
from tests.data.hostile import word
from tests.train.real import real_config

STEPS_AN_EPOCH = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lmdb(folder, ((word(i) if i % 7 else b"", None) for i in range(35)))
    return folder


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    assert a.tensors().keys() == b.tensors().keys()
    for name, x in a.tensors().items():
        assert torch.equal(x, b.tensors()[name]), name


def batches(data, step: int, count: int, rank: int = 0, world_size: int = 1, **fields) -> list[Batch]:
    config = resolve(real_config("unused", data, data__workers=2, **fields))
    stream = Stream(config)
    world = World(torch.device("cpu"), rank, world_size)
    found = stream.batches(step, make_plan(config, stream.epoch_size, world_size), world)
    made = [batch for step in islice(found, count) for batch in step]
    found.close()
    return made


def test_roots_that_share_files_are_named(data, tmp_path, caplog):
    (tmp_path / "link").symlink_to(data)
    config = resolve(real_config("unused", data, data__workers=2))
    config.data.roots = [str(data), str(tmp_path / "link")]
    assert Stream(config).epoch_size == 70
    assert "data.roots: 35 pictures are given twice" in caplog.text
    caplog.clear()
    config.data.roots = [str(data)]
    assert Stream(config).epoch_size == 35 and "twice" not in caplog.text


def test_a_method_of_labels_refuses_data_without_any(tmp_path, monkeypatch):
    """One label is enough, wherever it is; MaskOCR asks for one with its language half alone."""
    monkeypatch.setattr(stream_module, "_CHUNK", 4)
    for name, label in (("none", None), ("foreign", "京"), ("one", "a")):
        write_lmdb(tmp_path / name, ((word(i), label if i == 6 else None) for i in range(9)))

    def opened(name, method):
        config = PretrainConfig(method=method, data=DataConfig(roots=[str(tmp_path / name)]))
        return len(Stream(resolve(config))._source)

    supervised, maskocr = find("supervised").config, find("maskocr").config
    for name in ("none", "foreign"):
        for method in (supervised(), maskocr(language=True)):
            line = f"method {method.name} learns from labels: none of the 9 images of data.roots has one"
            with pytest.raises(ConfigError, match=line):
                opened(name, method)
        assert opened(name, maskocr()) == 9
    assert opened("one", supervised()) == opened("one", maskocr(language=True)) == 9


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_a_restart_in_mid_epoch_sees_the_very_same_pixels(data, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    whole, rest = (batches(data, step, 7 - step, data__decoder=decoder) for step in (0, 3))
    for a, b in zip(whole[3:], rest, strict=True):
        assert a.epoch == b.epoch
        assert_same(a, b)
    assert {batch.epoch for batch in rest} == {0, 1}


def test_views_of_dali_are_a_choice(data):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    whole, rest = (batches(data, step, 5 - step, data__augment="dali") for step in (0, 3))
    for a, b in zip(whole[3:], rest, strict=True):
        assert_same(a, b)
    (fused,) = batches(data, 0, 1)
    assert torch.equal(fused.index, whole[0].index) and not torch.equal(fused.views["query"], whole[0].views["query"])


def test_views_of_dali_need_dali(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "rcmstr_fast.ops.augment_views.dali", raising=False)
    with pytest.raises(ConfigError, match=r"data\.augment=dali must have NVIDIA DALI"):
        batches(data, 0, 1, data__augment="dali")


@pytest.mark.parametrize("division", ["direct", "vertical_projection"])
def test_views_launched_by_the_training_thread_are_the_same(data, monkeypatch, division):
    """The order of work on a GPU, on this device."""
    threads = set()
    make = views.augment_views
    monkeypatch.setattr(
        views, "augment_views", lambda *a, **k: threads.add(threading.current_thread()) or make(*a, **k)
    )
    ahead = batches(data, 0, 3, method__division=division)
    assert threading.main_thread() not in threads
    threads.clear()
    monkeypatch.setattr(stream_module, "views_in_threads", lambda device: False)
    late = batches(data, 0, 3, method__division=division)
    assert threads == {threading.main_thread()}
    for a, b in zip(ahead, late, strict=True):
        assert_same(a, b)
        assert ("permuted" in a.views) == ("order" in a.drawn) == (division == "direct")


def test_two_ranks_share_the_epoch(data):
    whole = batches(data, 0, STEPS_AN_EPOCH)
    parts = [batches(data, 0, STEPS_AN_EPOCH, rank=rank, world_size=2) for rank in range(2)]
    slots = [torch.cat([batch.index for batch in part]) for part in parts]
    assert not set(slots[0].tolist()) & set(slots[1].tolist())
    assert sorted(torch.cat(slots).tolist()) == sorted(torch.cat([batch.index for batch in whole]).tolist())
    for step, batch in enumerate(whole):
        for name in ("query", "key"):
            assert torch.equal(batch.views[name], torch.cat([part[step].views[name] for part in parts]))


def test_the_permuted_query_view_comes_along(data):
    config = resolve(real_config("unused", data))
    (batch,) = batches(data, 0, 1)
    order = permuted_order(batch.index, 0, config.method, config.seed)
    shape = {"num_patches": config.method.num_patches, "group_size": config.method.group_size}
    assert list(batch.views) == ["query", "key", "permuted"]
    assert torch.equal(batch.drawn["order"], order)
    assert torch.equal(batch.views["permuted"], ops.permute_strips(batch.views["query"], order, **shape))


@pytest.mark.parametrize("augment", ["fused", "dali"])
def test_views_have_the_precision_of_the_run(data, augment):
    if augment == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    (exact,), (rounded,) = (
        batches(data, 0, 1, data__augment=augment, train__precision=precision) for precision in ("fp32", "bf16")
    )
    for name, view in exact.views.items():
        assert view.dtype == torch.float32
        assert torch.equal(rounded.views[name], view.bfloat16())
        assert rounded.views[name].is_contiguous(memory_format=torch.channels_last)
