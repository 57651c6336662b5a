"""The pages are what the records say, also for records of a GPU, and a committed page cannot go stale."""

import copy
import json

import pytest
from bench.records import NOT_YET, load

from bench import plots, predictions, report
from bench.gpu.pieces import PIECES

STEP = {
    "status": "ok", "encoder": "resnet29", "width": 1.0, "method": "rcmstr", "batch": 512, "processes": 1,
    "precision": "bf16", "device": "cuda", "switches": {"cuda_graph": "on", "compile": "off"}, "best_ms": 99.0,
    "images_per_s": 5120.0, "floor_ms": 58.0, "share_of_roofline": 0.58, "mfu": 0.4, "peak_gib": 30.0,
    "reserved_gib": 33.0, "ceilings": "a GPU",
}  # fmt: skip
PIECE = {"machine": {"gpu": "a GPU"}, "version": "0.1.0"}


def write(folder, name, rows, **other):
    path = folder / "a-gpu" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(PIECE | {"rows": rows} | other))


@pytest.fixture
def results(tmp_path):
    (tmp_path / "aot").mkdir()
    row = {"HGMMA": 4, "HMMA": 0, "LDL": 0, "STL": 0, "stack": 0, "registers": 168, "shared": 65536}
    (tmp_path / "aot" / "triton-3.7.1.json").write_text(json.dumps({"loss_sm90": row}))
    steps = [STEP | {"provider": "ours", "ms": 100.0}, STEP | {"provider": "eager", "ms": 320.0}]
    write(tmp_path, "gpu-step-cnn.json", [*steps, STEP | {"provider": "ours", "ms": 60.0, "batch": 256}])
    write(tmp_path, "gpu-compile-cnn.json", [STEP | {"provider": "compile", "ms": 150.0, "reserved_gib": 66.0}])
    layers = [{"what": "product", "tflop_per_s": 780.0}, {"what": "copy", "gbyte_per_s": 4300.0},
              {"what": "products of a step", "encoder": "resnet29", "ms": 66.0}]  # fmt: skip
    write(tmp_path, "gpu-ceilings.json", layers)
    part = {"provider": "ours", "encoder": "resnet29", "batch": 512, "tflop": 1.0, "gbyte": 1.0, "floor_ms": 5.0,
            "share_of_roofline": 0.5, "status": "ok"}  # fmt: skip
    write(tmp_path, "gpu-parts.json", [part | {"part": "loss", "ms": 9.5}, part | {"part": "encoder", "ms": 80.0}])
    fit = {"what": "fit", "encoder": "resnet29", "checkpointed": False, "largest_batch": {"12": 96, "24": 208}}
    write(tmp_path, "gpu-memory.json", [fit])
    run = {"what": "first", "status": "ok", "from_step": 0, "to_step": 900, "median_data_wait_percent": 0.4}
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    write(tmp_path, "gpu-real.json", [run | {"metrics": lines}])
    write(tmp_path, "gpu-steady.json", [{"synchronises": "", "status": "ok"}])
    test = {"what": "test", "row": "rcmstr", "set": "iiit5k", "count": 3000}
    tests = [test | {"decoder": d, "accuracy": a, "seed": 0} for d, a in (("ctc", 0.25), ("attention", 0.5))]
    trained = {"what": "pretraining", "row": "rcmstr", "seed": 0, "steps": 3000, "batch": 256, "seconds": 170.0,
               "words": "words.txt", "changes": []}  # fmt: skip
    write(tmp_path, "gpu-learning-rcmstr-s0.json", [trained, *tests])
    return tmp_path


def test_committed_pages_are_what_the_records_say():
    assert report.main(["--check"]) == 0


def test_every_plot_that_a_page_shows_is_there():
    text = (report.DOCS / "performance.md").read_text(encoding="utf-8")
    shown = [part.split(")")[0] for part in text.split("](plots/")[1:]]
    assert shown and all((report.DOCS / "plots" / name).is_file() for name in shown)


def test_records_of_a_gpu_fill_the_page(results):
    page = report.performance_page(load(results), results)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "a-gpu: 1.50" in lines["CNN, B = 512: images/s of ours over torch.compile at least 1.5 (goal 2)"]
    assert "a-gpu: 3.20" in lines["CNN, B = 512: images/s of ours over eager at least 3"]
    assert "a-gpu: 50 %" in lines["B = 512: GPU memory at most 60 % of the compiled baseline's"]
    assert (
        "a-gpu: 0.40 %" in lines["data-wait under 2 %"] and "none" in lines["no host synchronisation in a steady step"]
    )
    assert "a-gpu 9.5" in lines["loss"] and "a-gpu 66.0 (layers alone)" in lines["dense convolutions"]
    assert "a-gpu 14.0 (encoder less its layers)" in lines["norms, ReLU, residuals"]
    assert "a-gpu 780 TFLOP/s" in lines["bf16 product, 8192^3"] and "4.30 TB/s" in page
    assert "| 5,120 |" in page.replace("  ", " ") or "5,120" in page
    assert NOT_YET in lines["ViT-Small, B = 512: MFU at least 45 %"]
    assert "step-cnn" not in page.split("without a record")[1] and "racecheck" in page.split("without a record")[1]


def test_results_stand_beside_the_papers(results):
    page = report.results_page(load(results))
    row = next(line for line in page.splitlines() if line.startswith("| RCMSTR"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["25.00", "50.00", "64.97", "70.00"]
    assert "iiit5k (3000 words)" in page and page.count(NOT_YET) == 10


def test_plots_are_drawn_from_the_records(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = {path.name for path in plots.write(load(results), tmp_path / "plots")}
    assert names == {"steps-a-gpu.svg", "loss-a-gpu.svg"}


def test_a_stale_page_is_named(results, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    assert report.main(["--check"]) == 1 and "docs/performance.md" in capsys.readouterr().out


def test_targets_and_table_name_pieces_that_exist():
    assert {piece for piece in predictions.TARGETS.values() if piece != "cpu"} <= set(PIECES)
    assert {f"learning-{row}" for row in predictions.TABLE_ONE} <= set(PIECES)


def test_cpu_steps_show_the_ratio(results):
    rows = [STEP | {"provider": p, "ms": ms, "best_ms": ms, "width": 0.25, "batch": 64, "reserved_gib": 0.0, "mfu": None}
            for p, ms in (("ours", 100.0), ("eager", 150.0))]  # fmt: skip
    records = copy.deepcopy(load(results)) | {"cpu": {"step": {"rows": rows}}}
    page = report.performance_page(records, results)
    assert "ours is 1.50 times as fast as plain PyTorch" in page
