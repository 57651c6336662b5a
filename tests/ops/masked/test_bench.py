"""The benchmark of the masked pass checks before it times, and records what it ran on."""

import json

import pytest
import torch

from bench import masked_pass
from rcmstr_fast.ops import native

pytestmark = pytest.mark.skipif(
    bool(native.reasons()) or torch.cuda.is_available(), reason="needs the extension and no GPU: it would run there"
)
SMALL = ["--batch", "2", "--widths", "0.125", "--repetitions", "2"]


def test_a_small_run_writes_ratios(tmp_path, capsys):
    assert masked_pass.main([*SMALL, "--only", "4x26", "--ratios", "0.5", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert [row["mask_ratio"] for row in record["rows"]] == [0.5, 0.0]
    for row in record["rows"]:
        assert row["status"] == "ok" and row["channels"] == 64 and row["error"] < 1e-5
        assert row["ratio"] == pytest.approx(row["best_ms"]["reference"] / row["best_ms"]["cpp"])
    assert record["machine"]["threads"] == torch.get_num_threads() and "ratio" in capsys.readouterr().out


def test_a_wrong_result_fails_and_is_not_timed():
    calls = []

    def way(order):
        calls.append(order)
        return torch.ones(3) * (1 if order == "reference" else 2)

    row = masked_pass.compare(way, "cpp", torch.float32, 5, "cpu")
    assert row["status"] == "FAIL" and row["error"] == pytest.approx(1.0) and calls == ["reference", "cpp"]
