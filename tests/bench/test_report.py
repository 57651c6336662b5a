"""The pages are what the records say, also for records of a GPU, and a committed page cannot go stale."""

import json
import re

import pytest

from bench.gpu.pieces import PIECES
from bench.report import __main__ as report
from bench.report import blocks, performance, plots, predictions, recipes, results
from bench.report.rows import load, studies
from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation import published
from rcmstr_fast.methods import costs

STEP = {
    "group": "step",
    "status": "ok",
    "encoder": "resnet29",
    "width": 1.0,
    "method": "rcmstr",
    "batch": 512,
    "processes": 1,
    "precision": "bf16",
    "device": "cuda",
    "switches": {"cuda_graph": "on", "compile": "off"},
    "best_ms": 99.0,
    "images_per_s": 5120.0,
    "floor_ms": 58.0,
    "share_of_roofline": 0.58,
    "mfu": 0.4,
    "peak_gib": 30.0,
    "reserved_gib": 33.0,
    "ceilings": "a GPU",
}
ABOUT = {"version": "0.1.0", "command": ["python", "-m", "x"], "gpus": [{"name": "a GPU"}], "threads": 2}


def write(folder, name, rows, **other):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    record = {"machine_info": ABOUT, "commit_info": {"id": "0" * 40, "dirty": False}, "benchmarks": [], "rows": rows}
    path.write_text(json.dumps(record | other))


def of_piece(name, rows):
    return [{"piece": name, "status": "ok"} | row for row in rows]


@pytest.fixture
def records(tmp_path):
    (tmp_path / "aot").mkdir()
    row = {"HGMMA": 4, "HMMA": 0, "LDL": 0, "STL": 0, "stack": 0, "registers": 168, "shared": 65536}
    (tmp_path / "aot" / "triton-3.7.1.json").write_text(json.dumps({"loss_sm90": row}))
    steps = [STEP | {"provider": "ours", "ms": 100.0}, STEP | {"provider": "eager", "ms": 320.0}]
    steps += [STEP | {"provider": "ours", "ms": 60.0, "batch": 256}]
    compiled = STEP | {"provider": "compile", "ms": 150.0, "reserved_gib": 66.0}
    fit = {"what": "fit", "encoder": "resnet29", "checkpointed": False, "largest_batch": {"12": 96, "24": 208}}
    pieces = of_piece("step-cnn", steps) + of_piece("compile-cnn", [compiled]) + of_piece("memory", [fit])
    write(tmp_path, "a-gpu/gpu-steps.json", pieces)
    layers = [
        {"what": "product", "tflop_per_s": 780.0},
        {"what": "copy", "gbyte_per_s": 4300.0},
        {"what": "products of a step", "encoder": "resnet29", "ms": 66.0},
    ]
    part = {
        "provider": "ours",
        "encoder": "resnet29",
        "batch": 512,
        "tflop": 1.0,
        "gbyte": 1.0,
        "floor_ms": 5.0,
        "share_of_roofline": 0.5,
    }
    measured = [part | {"part": "loss", "ms": 9.5}, part | {"part": "encoder", "ms": 80.0}]
    write(tmp_path, "a-gpu/gpu-parts.json", of_piece("ceilings", layers) + of_piece("parts", measured))
    run = {"what": "first", "from_step": 0, "to_step": 900, "median_data_wait_percent": 0.4}
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    write(tmp_path, "a-gpu/gpu-data.json", of_piece("real", [run | {"metrics": lines}]))
    write(tmp_path, "a-gpu/gpu-machine.json", of_piece("steady", [{"synchronises": ""}]))
    test = {"what": "test", "row": "rcmstr", "set": "iiit5k", "count": 3000}
    tests = [
        test | {"decoder": d, "accuracy": a, "seed": s}
        for d, a, s in (("ctc", 0.25, 0), ("ctc", 0.35, 1), ("attention", 0.5, 0))
    ]
    trained = {
        "what": "pretraining",
        "row": "rcmstr",
        "seed": 0,
        "steps": 3000,
        "batch": 256,
        "seconds": 170.0,
        "words": "words.txt",
        "changes": [],
    }
    write(tmp_path, "a-gpu/gpu-learning.json", of_piece("learning-rcmstr-s0", [trained, *tests]))
    return tmp_path


def test_committed_pages_are_what_the_records_say():
    assert report.main(["--check"]) == 0


def test_generated_blocks_leave_the_rest_of_a_page_alone():
    page = "# A\n\n<!-- x: made -->\nold\n<!-- end of x -->\n\ntext \\1\n"
    made = blocks.replace(page, "x", "new \\1")
    assert made == "# A\n\n<!-- x: made -->\n\nnew \\1\n\n<!-- end of x -->\n\ntext \\1\n"
    assert blocks.replace(made, "x", "new \\1") == made
    with pytest.raises(ConfigError, match="one block"):
        blocks.replace(page, "y", "")


def test_the_first_page_shows_the_newest_tables_or_says_where_they_will_stand(records):
    assert "will stand here" in results.short({}, []) and "|" not in results.short({}, [])
    shown = results.short(load(records), [])
    assert shown.startswith("**a-gpu: iiit5k (3000 words)**\n") and "30.00 (25.0 to 35.0)" in shown


def test_needs_of_recipes_are_the_arithmetic_of_the_step():
    config = recipes.load("tiny_cnn_seqmoco")
    config.train.global_batch_size = 64
    found, batch = recipes.need(config), 64
    flop = sum(work.flop for work in costs.step_works(config, batch, "bf16"))
    images = recipes.IMAGES * config.train.epochs
    assert found.hours["A100"] >= images / batch * flop / 312e12 / 3600
    config.train.epochs *= 2
    twice = recipes.need(config)
    assert twice.hours["A100"] == pytest.approx(2 * found.hours["A100"]) and twice.gib == found.gib
    config.train.global_batch_size = 128
    assert found.gib < recipes.need(config).gib < 2 * found.gib
    other = recipes.need(recipes.load("tiny_cnn_simclr"))
    assert 0 < other.hours["H200"] < other.hours["A100"] and other.gib > 0
    assert "*" in recipes.table(["tiny_cnn_simclr"]) and "*" not in recipes.table(["tiny_cnn_seqmoco"])


def test_every_plot_that_a_page_shows_is_there():
    text = (report.DOCS / "performance.md").read_text(encoding="utf-8")
    shown = [part.split(")")[0] for part in text.split("](plots/")[1:]]
    assert shown and all((report.DOCS / "plots" / name).is_file() for name in shown)


def test_records_of_a_gpu_fill_the_page(records):
    page = performance.page(load(records), records)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "1.50" in lines["CNN, B = 512: images/s of ours over torch.compile at least 1.5 (goal 2)"]
    assert "3.20" in lines["CNN, B = 512: images/s of ours over eager at least 3"]
    assert "50 %" in lines["B = 512: GPU memory at most 60 % of the compiled baseline's"].split("|")[3]
    assert "0.40 %" in lines["data-wait under 2 %"] and "none" in lines["no host synchronisation in a steady step"]
    assert lines["ViT-Small, B = 512: MFU at least 45 %"].split("|")[3].strip() == "-"
    assert "9.5" in lines["loss"] and "66.0 (layers alone)" in lines["dense convolutions"]
    assert "14.0 (encoder less its layers)" in lines["norms, ReLU, residuals"]
    assert "780 TFLOP/s" in lines["bf16 product, 8192^3"] and "4.30 TB/s" in page and "5,120" in page
    assert "a-gpu: a step of resnet29 with rcmstr, B = 512, is **1.00 times**" in page  # best_ms are alike here
    left = page.split("without a record")[1]
    assert "step-cnn" not in left and "racecheck" in left and "Nothing in this section is measured" not in page


def test_without_a_gpu_predictions_stand_alone():
    page = performance.page(load(report.RESULTS), report.RESULTS)
    measured, compiled, predicted = re.split("## Predicted from compiled code|## Predicted for a GPU", page)
    assert "Predicted, not measured" in compiled and "| H200 | five loss terms |" in compiled
    assert "Nothing in this section is measured" in predicted and "not yet measured" not in page
    assert "H200" not in measured and "| dense convolutions " in predicted


def test_results_stand_beside_the_papers(records):
    page = results.page(load(records), [])
    row = next(line for line in page.splitlines() if line.startswith("| RCMSTR"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["RCMSTR", "cnn", "30.00 (25.0 to 35.0)", "50.00", "64.97", "70.00"]
    assert "iiit5k (3000 words)" in page and "No study has left" not in page


def test_a_study_becomes_a_section(tmp_path):
    def result(accuracy):
        score = {"count": 9, "accuracy": accuracy}
        return {"sets": [{"set": "numbers", "protocol": "exact", "total": 10, "score": score}], "cpu_seconds": 60.0}

    run = {"finished": True, "cpu_seconds": 120.0, "images": 640, "steps": 20, "loss": 1.0}
    row = {
        "name": "RCLSTR",
        "published": "rclstr",
        "seeds": [0, 1],
        "pretraining": {"0": run, "1": run},
        "results": {"CTC": {"0": result(0.5), "1": result(0.7)}},
    }
    study = {
        "name": "tiny",
        "title": "Small CNNs",
        "note": "Three minutes each.",
        "table": "rcmstr_1",
        "encoder": "cnn",
        "metrics": [],
        "evaluations": [{"name": "CTC", "decoder": "ctc", "command": "probe"}],
        "rows": [row],
        "commands": 4,
        "done": 4,
        "processors": ["a laptop"],
        "commits": ["0123456789abcdef"],
        "cpu_minutes": 6.0,
    }
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.json").write_text(json.dumps(study), encoding="utf-8")
    page = results.page({}, studies(tmp_path))
    assert "## Small CNNs\n\nThree minutes each.\n\n![" in page and "No study has left" not in page
    line = next(line for line in page.splitlines() if line.startswith("| RCLSTR"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["RCLSTR", "2", "60.00 ± 14.14"]
    assert "4 of 4 commands done (finished); 6.0 minutes of processor time on a laptop; commit 0123456789" in page
    results.write_study_plots([study], tmp_path / "plots")
    (plot,) = (tmp_path / "plots").iterdir()
    assert f"(plots/{plot.name})" in page and plot.read_text(encoding="utf-8").startswith("<svg")
    assert load(tmp_path) == {}


def test_the_best_source_of_a_group_counts(tmp_path):
    timed = {"group": "ops", "operation": "x", "shape": "s", "provider": "ours", "mode": "forward", "status": "ok"}
    write(tmp_path, "cpu/ops.json", [timed | {"ms": 5.0}])
    stats = {"median": 2e-3, "q1": 1e-3, "q3": 3e-3, "min": 1e-3, "rounds": 3, "data": [1e-3, 2e-3, 3e-3]}
    entry = {"group": "s, forward", "name": "test", "extra_info": timed, "stats": stats}
    (row,) = performance.group(load(tmp_path), "cpu", "ops")
    assert row["ms"] == 5.0
    write(tmp_path, "cpu/benchmarks.json", [], benchmarks=[entry])
    (row,) = performance.group(load(tmp_path), "cpu", "ops")
    assert (row["ms"], row["ms_25"], row["best_ms"], row["group"]) == (2.0, 1.5, 1.0, "ops")


def test_plots_are_drawn_from_the_records(records, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = {path.name for path in plots.write(load(records), tmp_path / "plots")}
    assert names == {"steps-a-gpu.svg", "loss-a-gpu.svg", "predicted-steps.svg"}


def test_a_stale_page_is_named(records, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", records)
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    assert report.main(["--check"]) == 1 and "docs/performance.md" in capsys.readouterr().out


def test_targets_and_tables_name_what_exists():
    assert {target.piece for target in predictions.TARGETS if target.piece != "cpu"} <= set(PIECES)
    assert {f"learning-{row}" for row in results.KEYS} <= set(PIECES)
    table = published.table("rcmstr_1")
    assert all(table.find(key, encoder="cnn", decoder="ctc") for key in results.KEYS.values())


def test_cpu_steps_show_the_ratio(tmp_path):
    rows = [
        STEP | {"provider": p, "ms": ms, "best_ms": ms, "width": 0.25, "batch": 64, "reserved_gib": 0.0, "mfu": None}
        for p, ms in (("ours", 100.0), ("eager", 150.0))
    ]
    write(tmp_path, "cpu/step.json", rows)
    page = performance.page(load(tmp_path), tmp_path)
    assert "resnet29 x0.25 with rcmstr, B = 64, is **1.50 times** as fast as plain PyTorch" in page
    assert predictions.cpu_over_eager(load(tmp_path), "cpu") == "1.50"
