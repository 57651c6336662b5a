"""DALI's decoder beside Pillow's: the same samples, the same broken records, a batch that never fails."""

import io
import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import BrokenImage, PillowDecoder, decode_image
from rcmstr_fast.data.jpeg import plain_jpeg
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.loader import Loader, build_decoder
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import open_sources

LIMITS = {"max_pixels": 100_000, "min_side": 2}
SIZE = {"height": 32, "width": 100}


class _Now:
    """An executor that runs at once."""

    def map(self, work, items):
        return map(work, items)


def jpeg(i: int = 0, mode: str = "RGB", size: tuple[int, int] = (90, 40), **options) -> bytes:
    """A soft random picture."""
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (6, 12, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(out, "JPEG", **({"quality": 90} | options))
    return out.getvalue()


def dali_decoder(batch: int = 32):
    dali = pytest.importorskip("rcmstr_fast.data.dali", reason="DALI is not installed", exc_type=ImportError)
    return dali.DaliDecoder(PillowDecoder(**SIZE, **LIMITS), batch=batch, threads=1)


def load(decoder, items):
    return decoder.load(lambda records: [items[i] for i in records], np.arange(len(items)), _Now(), 2)


def plain(data: bytes | None) -> bool:
    return plain_jpeg(data, **LIMITS)


def test_plain_jpeg_takes_what_every_decoder_reads_alike():
    assert plain(jpeg()) and plain(jpeg(mode="L")) and plain(jpeg(progressive=True)) and plain(jpeg() + b"more")
    exif = Image.Exif()
    exif[0x0112] = 6
    refused = [
        None,
        b"",
        b"\xff\xd8",
        b"GIF89a",
        jpeg(mode="CMYK"),
        jpeg(exif=exif),
        jpeg(size=(1, 40)),
        jpeg(size=(400, 300)),
        jpeg()[:-2],
        jpeg()[:200],
    ]
    assert not any(plain(data) for data in refused)


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_plain_jpeg_never_fails(noise, cut):
    plain(b"\xff\xd8" + noise)
    plain(jpeg()[:cut] + noise)
    plain(noise)


def test_same_pictures_as_pillow_to_the_resampling():
    items = [jpeg(i, size=(40 + 7 * i, 20 + 3 * i), progressive=i % 2 == 1) for i in range(16)]
    images, broken = load(dali_decoder(), items)
    expected, _ = load(PillowDecoder(**SIZE, **LIMITS), items)
    difference = (images.int() - expected.int()).abs().float()
    assert not broken and images.shape == (16, 32, 100, 3) and images.dtype == torch.uint8
    assert difference.mean() < 0.3 and (difference > 1).float().mean() < 0.01 and difference.max() <= 16


def test_images_outlive_the_next_batches():
    decoder = dali_decoder(4)
    images, _ = load(decoder, [jpeg(i) for i in range(4)])
    kept = images.clone()
    for first in (4, 8, 12):
        load(decoder, [jpeg(first + i) for i in range(4)])
    assert torch.equal(images, kept)


def test_a_picture_does_not_depend_on_its_batch():
    items = [jpeg(i) for i in range(8)]
    together, _ = load(dali_decoder(), items)
    damaged = jpeg(9).replace(b"\xff\xc4", b"\xff\xc4\xff", 1)
    with_bad, broken = load(dali_decoder(), [*items[:3], damaged, *items[3:], b"", jpeg(8, mode="CMYK")])
    alone = torch.cat([load(dali_decoder(), [item])[0] for item in items])
    assert torch.equal(together, alone) and torch.equal(with_bad[[0, 1, 2, 4, 5, 6, 7, 8]], together)
    assert {3, 9} >= broken.keys() >= {9} and 10 not in broken


def test_damage_that_only_the_decoder_sees_is_named_by_pillow():
    """The tables are cut short inside their segment: sound headers, but no decoder can go on."""
    data = jpeg(3)
    start = data.index(b"\xff\xc4") + 5
    damaged = data[:start] + b"\xff" * 16 + data[start + 16 :]
    assert plain(damaged)
    with pytest.raises(BrokenImage):
        decode_image(damaged, 32, 100, **LIMITS)
    items = [jpeg(i) for i in range(7)] + [damaged] + [jpeg(i) for i in range(7, 12)] + [damaged]
    decoder = dali_decoder()
    for _ in range(2):  # the pipeline has recovered
        images, broken = load(decoder, items)
        assert broken.keys() == {7, 13} and "OSError" in broken[7]
        assert torch.equal(images[12], load(decoder, [jpeg(11)])[0][0])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_flipped_bytes_never_bring_the_pipeline_down(flips, end):
    data = bytearray(jpeg(1))
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    del data[int(end * 2 * len(data)) :]
    items = [jpeg(2), bytes(data), jpeg(3)]
    images, broken = load(dali_decoder(), items)
    assert broken.keys() <= {1}
    assert torch.equal(images[[0, 2]], load(dali_decoder(), [items[0], items[2]])[0])


def loader(source, decoder: str, **options):
    data = DataConfig(workers=2, decoder=decoder, max_pixels=LIMITS["max_pixels"])
    return Loader(source, EpochOrder(source.sizes, seed=3), **SIZE, data=data, local_batch=10, **options)


def test_loader_shows_the_same_samples_with_both_decoders(tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    write_lmdb(tmp_path, ((jpeg(i) if i % 5 else b"nothing", None) for i in range(40)))
    source = open_sources([tmp_path])
    for a, b in zip(loader(source, "dali").batches(1), loader(source, "pillow").batches(1), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.records, b.records)
        assert (a.images.int() - b.images.int()).abs().float().mean() < 0.4
    rest = list(loader(source, "dali").batches(1, step=3))
    assert torch.equal(rest[0].images, list(loader(source, "dali").batches(1))[3].images)


@pytest.mark.parametrize(("decoder", "level"), [("auto", logging.INFO), ("dali", logging.WARNING)])
def test_without_dali_pillow_takes_over_and_says_so_once(tmp_path, monkeypatch, caplog, decoder, level):
    write_lmdb(tmp_path, ((jpeg(i), None) for i in range(20)))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "rcmstr_fast.data.dali", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.INFO):
        made = loader(open_sources([tmp_path]), decoder)
        assert len(list(made.batches(0)) + list(made.batches(1))) == 4
    said = [record for record in caplog.records if "DALI" in record.getMessage()]
    assert [record.levelno for record in said] == [level]
    assert f"decoded by pillow in 2 threads (data.decoder={decoder}: DALI cannot be imported" in said[0].getMessage()


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_dali_only_where_there_is_a_gpu(monkeypatch, caplog, gpu):
    dali = pytest.importorskip("rcmstr_fast.data.dali", reason="DALI is not installed", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.INFO):
        made = build_decoder(DataConfig(decoder="auto"), **SIZE, batch=4, workers=1)
    assert isinstance(made, dali.DaliDecoder if gpu else PillowDecoder)
    name, why = ("dali", "there is a GPU to feed") if gpu else ("pillow", "there is no GPU to feed")
    (said,) = caplog.records
    assert said.getMessage() == f"pictures are decoded by {name} in 1 threads (data.decoder=auto: {why})"


def test_doctor_tells_the_decoder_and_why(monkeypatch):
    from rcmstr_fast.train.environment import environment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "pictures are decoded by pillow (data.decoder=auto: there is no GPU to feed)" in environment()["choices"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_mixed_needs_a_gpu(tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    write_lmdb(tmp_path, [(jpeg(0), None)] * 10)
    with pytest.raises(ConfigError, match="dali_mixed must have a CUDA GPU"):
        loader(open_sources([tmp_path]), "dali_mixed")


def test_tall_pictures_are_turned_alike_and_only_where_ordered():
    items = [jpeg(1), jpeg(2, size=(20, 90)), jpeg(3, size=(40, 60)), jpeg(4, size=(41, 61)), jpeg(5, size=(30, 30))]
    assert [plain_jpeg(data, **LIMITS, tallest=1.5) for data in items] == [True, False, False, True, True]
    turned, _ = load(PillowDecoder(**SIZE, **LIMITS, rotate="tall"), items)
    upright, _ = load(PillowDecoder(**SIZE, **LIMITS), items)
    assert [(a != b).any().item() for a, b in zip(turned, upright)] == [False, True, True, False, False]
    dali = pytest.importorskip("rcmstr_fast.data.dali", reason="DALI is not installed", exc_type=ImportError)
    found, broken = load(dali.DaliDecoder(PillowDecoder(**SIZE, **LIMITS, rotate="tall"), batch=8, threads=1), items)
    assert broken == {} and (found.float() - turned.float()).abs().mean() < 1


def test_the_loader_turns_as_the_configuration_says(tmp_path):
    write_lmdb(tmp_path / "set", [(jpeg(i, size=(20, 90)), None) for i in range(4)])
    source = open_sources([tmp_path])
    for rotate in ("never", "tall"):
        data = DataConfig(decoder="pillow", workers=1, rotate=rotate)
        order = EpochOrder(source.sizes, seed=1)
        (batch,) = Loader(source, order, **SIZE, data=data, local_batch=4).batches(0)
        for image, record in zip(batch.images, batch.records.tolist()):
            expected = decode_image(source.read([record])[0], 32, 100, **LIMITS, rotate=rotate)
            assert (image.numpy() == expected).all()
