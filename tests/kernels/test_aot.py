"""Shipped Triton configurations compile as the committed table says, without a GPU; and what the gate refuses."""

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


#: One kernel of each kind, in the form that training runs; `python -m bench.aot` compiles everything.
SAMPLE = "^(gradient_root_d128_q2_whole_by16|masked_conv_stats_k3_512_512|info_nce_stats_d128|enqueue_fp32)_"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sm80", "sm86", "sm90"])
def test_shipped_configurations_pass_the_gate(part):
    done = aot("--only", f"{SAMPLE}{part}$")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": 4 configurations, 0 problems" in done.stdout


def test_every_kernel_is_compiled_for_every_architecture_in_both_specialisations():
    """Triton compiles another kernel where sizes are multiples of 16: the gate must see both."""
    code = """
from rcmstr_fast.kernels.architectures import KNOWN
from rcmstr_fast.kernels.queue_losses.tiles import SCHEDULED
from rcmstr_fast.kernels.shipped import configurations
made = configurations()
names = [c.name for c in made]
assert len(set(names)) == len(names)
stems = {sm: {n.rsplit("_", 1)[0] for n in names if n.endswith(f"_sm{sm}")} for sm in KNOWN}
for sm, found in stems.items():
    assert {n + "_by16" for n in found if not n.endswith("_by16")} <= found
    # One launch of a pass is compiled where it runs; all else for every architecture.
    alone = {n for n in found if not n.startswith("scheduled")}
    assert len(alone) == len({n for n in stems[80] if not n.startswith("scheduled")}), sm
    together = {(n.split("_")[1], int(n.split("_d")[1].split("_")[0])) for n in found - alone}
    assert together == {where for where, families in SCHEDULED.items() if KNOWN[sm].family in families}, sm
assert sorted(KNOWN) == [80, 86, 89, 90, 100, 120]
for c in made:
    if c.name == "gradient_root_d128_q2_by16_sm90":
        places = {at for at in c.aligned()}
        sizes = list(c.signature()).index("sizes")
        assert {(sizes, i) for i in range(4)} <= places
assert any("info_nce_grad_candidates" in n for n in names)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("table", TABLES, ids=lambda p: p.stem)
def test_committed_tables_hold_no_spills_and_use_the_tensor_cores(table):
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert len(rows) > 50
    for name, row in rows.items():
        assert row["stack"] == row["STL"] == row["LDL"] == 0, name
        assert not row.get("serialised"), name
        if name.startswith(("stats", "gradient")):
            assert row["HGMMA"] or row["HMMA"] or row.get("UTCHMMA"), name
            assert row["registers"] > 64, name


def test_the_gate_sees_each_kind_of_fault():
    """A row as ptxas leaves it when it gives up (32 registers, kilobytes of stack), and other faults, are named."""
    code = """
from bench.aot.gate import faults
from rcmstr_fast.kernels.shipped import configurations
known = {c.name: c for c in configurations()}
good = {"registers": 168, "stack": 0, "shared": 98304, "buffers": 3, "serialised": 0, "HGMMA": 24, "HMMA": 0,
        "UTCHMMA": 0, "STL": 0, "LDL": 0}
c = known["stats_root_d128_q2_sm90"]
assert faults(c, good) == [], faults(c, good)
for change, word in [({"registers": 32, "stack": 9000}, "stack"), ({"LDL": 3}, "LDL"), ({"HGMMA": 0}, "HGMMA"),
                     ({"buffers": 1}, "buffers"), ({"shared": 230 << 10}, "shared"), ({"registers": 300}, "registers"),
                     ({"serialised": 1}, "C75")]:
    assert any(word in fault for fault in faults(c, good | change)), change
mma = good | {"HGMMA": 0, "HMMA": 96, "shared": 104 << 10, "buffers": 3}
assert faults(known["gradient_root_d128_q2_sm80"], mma) == []
assert any("shared" in fault for fault in faults(known["gradient_root_d128_q2_sm86"], mma))
assert any("shared" in fault for fault in faults(known["gradient_root_d128_q2_sm120"], mma))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_a_table_is_written_without_rows_that_have_a_fault():
    """And a row of an earlier table that has one now goes."""
    code = """
import json, sys, tempfile
from pathlib import Path
import bench.aot.__main__ as aot
from rcmstr_fast.kernels.shipped import configurations
good = {"registers": 40, "stack": 0, "shared": 0, "buffers": 0, "STL": 0, "LDL": 0}
names = [c.name for c in configurations() if c.name.startswith("enqueue_fp32_")][:3]
found = {names[0]: (good, ""), names[1]: (good | {"stack": 8}, ""), names[2]: ({}, "does not compile")}
aot._row = lambda name: found[name]
with tempfile.TemporaryDirectory() as folder:
    aot.TABLES = Path(folder)
    aot.table_path().write_text(json.dumps({name: good for name in names}))
    assert aot.main(["--write", "--only", "^(" + "|".join(names) + ")$"]) == 1
    assert json.loads(aot.table_path().read_text()) == {names[0]: good}
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stack is 8, must be 0" in done.stdout and "does not compile" in done.stdout


def test_only_takes_a_regular_expression():
    done = aot("--only", "(")
    assert done.returncode == 2
    assert done.stderr.startswith("--only must be a regular expression, got '(': missing ), ")
    assert done.stderr.count("\n") == 1


def test_a_name_that_nothing_has_is_refused():
    done = aot("--only", "^gradient_rot_d128")
    assert done.returncode == 2
    assert done.stderr == "--only must match the name of a shipped configuration, got '^gradient_rot_d128'\n"


LISTING = """
.text.kernel:
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   MUFU.EX2 R20, R4 ;
        /*0040*/                   FFMA R21, R20, R20, RZ ;
        /*0050*/                   LDSM.16.M88.4 R8, [R30] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R31], desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


def test_the_model_counts_the_main_loop_and_waits_for_operands():
    code = """
import sys
from bench.aot import sass, simulate
body = [sass.parse(text) for text in sass.main_loop(sys.argv[1])]
assert [one.pipe for one in body] == ["tensor", "mufu", "fma", "shared", "global", "control"], body
bounds = sass.bounds(body, 4, 80)
assert (bounds["tensor"], bounds["mufu"], bounds["fma"], bounds["issue"]) == (8.0, 8.0, 2.0, 6.0), bounds
assert bounds["shared"] == 4 * (512 + 512) / 128 and bounds["global"] == 4 * 512 / 64
assert sass.bounds(body, 8, 80)["tensor"] == 16.0 and sass.bounds(body, 4, 90)["fma"] == 1.0
alone = simulate.cycles(body, warps=4, programs=1, architecture=80)
shared = simulate.cycles(body, warps=4, programs=4, architecture=80, rounds=400)
chain = simulate.LATENCY["tensor"] + simulate.LATENCY["shared"]
assert 0.98 * max(bounds.values()) <= shared < alone and alone >= chain, (alone, shared)  # a window of rounds
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code, LISTING], cwd=ROOT, env=environment, check=True)
