"""`rcmstr bench pipeline`: three rates, the slower side, a JSON; the peers agree with ours before they are timed."""

import json

import pytest
import torch

from rcmstr_fast.cli.main import main
from rcmstr_fast.config import resolve
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.measure import pipeline as measured
from rcmstr_fast.measure.pipeline import Rate, Report, interleaved
from rcmstr_fast.ops.augment_views import OPERATIONS, parameters, reference
from tests.data.hostile import word
from tests.train.real import real_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lmdb(folder, ((word(i), None) for i in range(32)))
    return folder


def test_pipeline_writes_what_it_measured(data, tmp_path, capsys):
    small = [
        "--model.width", "0.25", "--model.image_width", "36", "--method.queue_size", "64", "--data.workers", "1",
        "--model.projector_hidden", "16", "--model.feature_dim", "16", "--train.global_batch_size", "4",
        "--train.device", "cpu", "--train.precision", "fp32",
    ]  # fmt: skip
    measured = ["--seconds", "0.1", "--repetitions", "1", "--out", str(tmp_path)]
    assert main(["bench", "pipeline", "--data.roots", f"[{data}]", *measured, *small]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("*/pipeline-*.json")
    record = json.loads(path.read_text())
    report = record["report"]
    assert set(report["stages"]) == {"read", "decode", "augment"}
    assert all(rate["images_per_s"] > 0 and rate["per_core"] > 0 for rate in report["stages"].values())
    assert min(report["data"], report["model"], report["both"]) > 0 and 0 <= report["wait_percent"] <= 100
    assert report["model"] < report["data"] and record["verdict"].startswith("the model is the slower side")
    assert record["verdict"] in shown and str(path) in shown
    assert {"commit", "cpu", "command", "libraries"} <= record["machine_info"].keys()
    assert not list(data.glob("run*"))


def test_the_verdict_names_the_slower_side_and_its_slowest_stage():
    stages = {"read": Rate(9000, 1), "decode": Rate(300, 1), "augment": Rate(5000, 1)}
    assert Report(stages, 200, 500, 190, 60).verdict == (
        "the data is the slower side: 200 images/s, the model alone makes 500 (2.50x); its slowest stage is decode"
    )
    assert Report(stages, 800, 500, 480, 1).verdict == (
        "the model is the slower side: 500 images/s, the data alone makes 800 (1.60x)"
    )


def test_runs_are_timed_in_turn():
    calls = []
    rates = interleaved({"a": lambda: calls.append("a") or 3, "b": lambda: calls.append("b") or 5}, 2)
    assert calls == ["a", "b"] * 3 and rates["b"].images_per_s > 0


def test_peers_of_each_stage(data):
    pytest.importorskip("scipy", reason="scipy is not installed")
    from bench import data as pipeline

    config = resolve(real_config("unused", data, data__workers=1))
    rows = pipeline.peers(measured.sample(config), 1)
    assert {row["stage"] for row in rows} == {"read", "decode", "augment"}
    assert all(row["status"] == "ok" and row["images_per_s"] > 0 for row in rows)
    assert [row["provider"] for row in rows if row["ours_is"] == 1.0 and row["stage"] == "augment"] == ["ours"]


def test_a_peer_that_is_off_is_not_timed(data, monkeypatch):
    pytest.importorskip("scipy", reason="scipy is not installed")
    from bench import data as pipeline
    from bench.data import chain

    monkeypatch.setitem(chain.OPERATIONS, "blur", lambda image, row: image)
    config = resolve(real_config("unused", data, data__workers=1))
    rows = [row for row in pipeline.peers(measured.sample(config), 1) if row["stage"] == "augment"]
    assert {"numpy, scipy, pillow": "FAIL"}.items() <= {row["provider"]: row["status"] for row in rows}.items()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_published_chain_is_the_same_chain(name):
    pytest.importorskip("scipy", reason="scipy is not installed")
    from bench.data import chain

    generator = torch.Generator().manual_seed(2)
    small = torch.rand(4, 3, 8, 20, generator=generator)
    pictures = torch.nn.functional.interpolate(small, (32, 100), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    images = pictures.permute(0, 2, 3, 1).contiguous()
    rows = parameters.only(parameters.draw_parameters(torch.arange(4), seed=5, epoch=0, view=0), name)
    expected = reference.apply_parameters(images, rows[None])[0].permute(0, 2, 3, 1)
    for image, row, wanted in zip(images.numpy(), rows.numpy(), expected, strict=True):
        made = torch.from_numpy(chain.augment_image(image, row))
        assert ((made - wanted).abs() * 127.5).mean() < 0.6


def test_wrong_lengths_are_one_line(data, capsys):
    assert main(["bench", "pipeline", "--data.roots", f"[{data}]", "--seconds", "0"]) == 2
    assert "seconds must be more than 0, got 0.0" in capsys.readouterr().err
