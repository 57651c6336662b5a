"""Whole steps are measured after their losses agree; parts and products cover the step; records compare."""

import json

import pytest

from bench import step as bench_step
from bench.step import parts, products
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError
from rcmstr_fast.measure import step as step_speed
from rcmstr_fast.measure.ceilings import Ceilings
from rcmstr_fast.measure.running import OurStep, first_loss, made_up_batches
from rcmstr_fast.measure.step import compare, measure
from rcmstr_fast.train.distributed import World
from tests.bench.tiny import CPU, tiny
from tests.train.launch import launch

CEILINGS = Ceilings(1e11, 1e10, "test")


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_rows_of_ours_and_the_baseline(encoder):
    rows = measure(tiny(encoder), World(CPU), bench_step.factories(["eager"]), 2, CEILINGS)
    assert [row["provider"] for row in rows] == ["ours", "eager"] and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert row["best_ms"] <= row["ms"] and row["images_per_s"] == pytest.approx(4e3 / row["ms"])
        assert row["share_of_roofline"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["tflop"] == rows[0]["tflop"] > 0 and row["mfu"] is None
    json.dumps(rows)


def test_a_provider_that_disagrees_fails_and_is_not_timed():
    class Wrong:
        steps = 0

        def first_loss(self, batch):
            return 1e6

        def step(self, batches):
            Wrong.steps += 1

    def broken(config, device, state):
        raise RuntimeError("cannot")

    rows = measure(tiny(), World(CPU), {"wrong": lambda *_: Wrong(), "broken": broken}, 1, CEILINGS)
    status = {row["provider"]: row["status"] for row in rows}
    assert status == {"wrong": "FAIL", "broken": "RuntimeError: cannot", "ours": "ok"} and Wrong.steps == 0


def test_the_first_loss_is_that_of_the_initial_weights(tmp_path):
    ours = OurStep(tiny(), World(CPU), tmp_path / "run")
    batch = made_up_batches(ours.config, ours.plan, World(CPU), 1)[0]
    expected = first_loss(ours.config, World(CPU), batch[0])
    ours.step(batch)
    assert first_loss(ours.config, World(CPU), batch[0]) == expected
    assert int(ours.trainer.method.queues["word"].pointer) == 4 and ours.trainer.step == 0
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.pt"))


def test_every_part_of_both_sides():
    rows = bench_step.part_rows(tiny(), ["eager", "compile"], World(CPU), 2)
    assert [(row["provider"], row["part"]) for row in rows] == [(p, n) for p in ("ours", "eager") for n in parts.PARTS]
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    flop = {row["part"]: row["tflop"] for row in rows if row["provider"] == "ours"}
    assert flop["encoder"] > flop["masked pass"] > 0 and flop["update"] == 0
    assert "part" not in rows[0]["provider"] and step_speed.line(rows[0]).startswith("ours")


def test_products_are_the_layers_of_the_encoder():
    config = tiny()
    rows = products.rows(config, 2, "fp32", "cpu", 2)
    assert {row["direction"] for row in rows} == set(products.DIRECTIONS)
    forward = sum(row["tflop"] * row["count"] for row in rows if row["direction"] == "forward")
    dense = sum(p.flop for p, _ in products.encoder_products(config))
    assert forward == pytest.approx(2 * dense / 1e12, rel=1e-9)
    assert products.step_ms(rows, 2) > sum(row["ms"] for row in rows if row["direction"] == "forward")


def row(provider, ms, **other):
    keys = {"encoder": "resnet29", "width": 1.0, "method": "rcmstr", "batch": 8, "processes": 1, "precision": "fp32"}
    return {"provider": provider, "best_ms": ms, "status": "ok", "device": "cuda"} | keys | other


def test_compare_names_what_became_slower():
    old = [row("ours", 100.0), row("eager", 300.0)]
    assert compare(old, [row("ours", 104.0), row("eager", 290.0)], 0.05) == []
    (line,) = compare(old, [row("ours", 110.0), row("eager", 290.0)], 0.05)
    assert line.startswith("ours, resnet29") and line.endswith("10.0 % slower")
    with pytest.raises(ConfigError, match="no row of the same provider"):
        compare(old, [row("ours", 1.0, batch=16)], 0.05)


def test_on_a_cpu_ratios_are_compared():
    old = [row("ours", 100.0, device="cpu"), row("eager", 200.0, device="cpu")]
    busy = [row("ours", 150.0, device="cpu"), row("eager", 300.0, device="cpu")]
    assert compare(old, busy, 0.05) == []
    assert len(compare(old, [row("ours", 150.0, device="cpu"), row("eager", 200.0, device="cpu")], 0.05)) == 1


def test_the_command_measures_writes_and_compares(tmp_path, capsys):
    small = [
        "--model.width",
        "0.25",
        "--model.image_width",
        "36",
        "--method.queue_size",
        "64",
        "--train.device",
        "cpu",
        "--model.projector_hidden",
        "16",
        "--model.feature_dim",
        "16",
        "--train.precision",
        "fp32",
    ]
    words = ["bench", "step", "--batches", "4", "--repetitions", "1", "--out", str(tmp_path), *small]
    assert main(words) == 0
    (path,) = tmp_path.glob("cpu/step-*.json")
    record = json.loads(path.read_text())
    assert [row["provider"] for row in record["rows"]] == ["ours", "eager"] and record["rows"][0]["batch"] == 4
    assert "images/s" in capsys.readouterr().out
    for row in record["rows"]:
        row["best_ms"] *= 1e-3 if row["provider"] == "ours" else 1.0
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(record))
    assert main([*words, "--compare", str(earlier)]) == 1 and "slower than" in capsys.readouterr().out
    assert main([*words, "--providers", "ours,fastest"]) == 2 and "got 'fastest'" in capsys.readouterr().err
    assert main([*words, "--batches", "four"]) == 2 and "got 'four'" in capsys.readouterr().err


def test_two_processes_measure_one_batch_together(tmp_path):
    small = [
        "--model.width=0.25",
        "--model.image_width=36",
        "--method.queue_size=64",
        "--train.device=cpu",
        "--model.projector_hidden=16",
        "--model.feature_dim=16",
        "--train.precision=fp32",
    ]
    words = ["bench", "step", "--providers", "ours", "--batches", "8", "--repetitions", "1", "--out", str(tmp_path)]
    results = launch("rcmstr_fast.cli.main", *words, *small)
    assert [status for status, _ in results] == [0, 0], results
    (path,) = tmp_path.glob("cpu/step-*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["processes"], row["batch"], row["status"]) == (2, 8, "ok")
