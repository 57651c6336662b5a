"""Every shipped Triton configuration compiles for sm_80 and sm_90 as the committed table says, without a GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "bench" / "results" / "aot").glob("triton-*.json"))
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def aot(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: here the kernels may already be bound to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.aot", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sm80", "sm90"])
def test_shipped_configurations_pass_the_gate(part):
    done = aot("--only", part)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("table", TABLES, ids=lambda p: p.stem)
def test_committed_tables_hold_no_spills_and_use_the_tensor_cores(table):
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert len(rows) > 100
    for name, row in rows.items():
        assert row["stack"] == row["STL"] == row["LDL"] == 0, name
        if name.startswith(("stats", "gradient")):
            assert row["HGMMA" if name.endswith("sm90") else "HMMA"] > 0, name
            assert row["registers"] > 64, name


def test_the_gate_sees_each_kind_of_fault():
    """A row as ptxas leaves it when it gives up (32 registers, kilobytes of stack), and other faults, are named."""
    code = """
import json, sys
from bench.aot import configurations, faults
c = next(c for c in configurations() if c.name == "stats_root_d128_q2_sm90")
good = json.load(open(sys.argv[1]))[c.name]
assert faults(c, good) == [], faults(c, good)
for change, word in [({"registers": 32, "stack": 9000}, "stack"), ({"LDL": 3}, "LDL"), ({"HGMMA": 0}, "HGMMA"),
                     ({"buffers": 1}, "buffers"), ({"shared": 230 << 10}, "shared"), ({"registers": 300}, "registers")]:
    assert any(word in fault for fault in faults(c, good | change)), change
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code, str(TABLES[-1])], cwd=ROOT, env=environment, check=True)
