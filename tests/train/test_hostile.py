"""A run over a corrupted LMDB trains through, names every bad record once and shows none of them."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.loader import Loader
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.stream import Stream
from tests.data.hostile import unusable, unusual, word, write_hostile
from tests.train.real import real_config
from tests.train.toy import ToyMethod


def named(run) -> Counter:
    """Records named as broken in log.txt, by number."""
    found = re.findall(r"broken record .*?(?:data\.mdb:image-)(\d{9})", RunFolder(run).text.read_text())
    return Counter(int(number) - 1 for number in found)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


def run(folder, data, decoder: str, **fields):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = real_config(
        folder, data, data__decoder=decoder, data__workers=2, train__global_batch_size=15, train__log_every=5, **fields
    )
    return pretrain(config, build=ToyMethod)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_trains_through_and_names_every_bad_record_once(tmp_path, decoder):
    kinds = write_hostile(tmp_path / "data")
    where = {kind: i for i, kind in enumerate(kinds)}
    assert len(kinds) == 215
    path = run(tmp_path / "run", tmp_path / "data", decoder, train__steps=3 * 14)
    counts = named(path)
    assert set(counts.values()) == {1}
    bad = {where[kind] for kind in unusable()}
    may_be_bad = bad | {i for kind, i in where.items() if kind.startswith("flipped")}
    assert bad <= counts.keys() <= may_be_bad
    lines = metrics(path)
    assert lines[-1]["step"] == 42 and lines[-1]["broken"] == len(counts) and lines[-1]["nonfinite"] == 0
    assert np.isfinite([line["loss"] for line in lines]).all()


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_unusual_pictures_are_shown_and_unusable_ones_never(tmp_path, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    records = unusual() | unusable()
    write_lmdb(tmp_path, ((data, None) for data in records.values()))
    config = real_config(tmp_path / "run", tmp_path, data__decoder=decoder, data__weights=[1.0])
    stream = Stream(config)
    loader = Loader(stream._source, stream._order, height=32, width=100, data=config.data, local_batch=len(records))
    (batch,) = loader.batches(0)
    assert set(batch.records.tolist()) == set(range(len(unusual())))
    assert len(loader.broken) == len(unusable())
    assert torch.unique(batch.images.flatten(1), dim=0).shape[0] >= len(unusual())


@pytest.mark.parametrize("size", [(60, 24), (300, 120)])  # values inside of leaf pages, and with pages of their own
def test_a_truncated_data_file_trains_on_what_is_left(tmp_path, size, caplog):
    count, batch = 60, 15
    write_lmdb(tmp_path / "data", ((word(i, size=size), f"word {i}") for i in range(count)))
    file = tmp_path / "data" / "data.mdb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    path = run(tmp_path / "run", tmp_path / "data", "pillow", train__steps=2 * count // batch)
    counts = named(path)
    assert set(counts.values()) == {1} and metrics(path)[-1]["broken"] == len(counts)
    assert 0.2 * count < len(counts) < 0.6 * count
    assert RunFolder(path).text.read_text().count("missing or unreadable record") == len(counts)
    assert caplog.text.count("is damaged or a part of a copy") == 1


def test_a_file_cut_to_its_head_is_one_clear_error(tmp_path):
    write_lmdb(tmp_path / "data", ((word(i), None) for i in range(60)))
    file = tmp_path / "data" / "data.mdb"
    file.write_bytes(file.read_bytes()[: 2 * 4096])
    with pytest.raises(ConfigError, match=r"expected an LMDB data file at .*: truncated or damaged: none of its"):
        run(tmp_path / "run", tmp_path / "data", "pillow")


def test_a_damaged_page_loses_its_records_only(tmp_path):
    kept = [word(i, size=(200, 80)) for i in range(60)]
    write_lmdb(tmp_path / "data", ((data, None) for data in kept))
    file = tmp_path / "data" / "data.mdb"
    raw = bytearray(file.read_bytes())
    start = raw.index(kept[30])
    raw[start - 16 : start + 32] = b"\xff" * 48  # the head of an overflow page
    file.write_bytes(raw)
    path = run(tmp_path / "run", tmp_path / "data", "pillow", train__steps=8)
    assert named(path) == {30: 1} and metrics(path)[-1]["broken"] == 1
