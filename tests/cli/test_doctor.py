import json

import torch

from rcmstr_fast import env
from rcmstr_fast.cli.doctor import text
from rcmstr_fast.cli.main import main
from rcmstr_fast.ops import dispatch


def test_report_names_versions_operations_and_variables(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "commit" in out and "extension" in out
    for name in [*dispatch.availability(), *env.VARIABLES, "triton", "lmdb", "Pillow"]:
        assert name in out, name


def test_json_has_the_reasons(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == dispatch.availability()
    assert all(reasons["reference"] == [] for reasons in report["backends"].values())
    assert report["libraries"]["torch"] == torch.__version__ and report["command"]


def test_text_tells_why_a_backend_is_not_usable():
    report = {
        "version": "1",
        "commit": None,
        "python": "3",
        "platform": "Linux",
        "cpu": "x",
        "cpus": 2,
        "gpus": [{"name": "H", "memory_gib": 80.0, "capability": "9.0"}],
        "cuda": "13.0",
        "libraries": {"triton": None},
        "extension": {"built": False, "cuda": False, "reason": "no module"},
        "variables": {},
        "backends": {"enqueue_": {"cuda": ["no GPU", "no build"], "reference": []}},
    }
    out = text(report)
    assert "not cuda: no GPU; no build" in out and "not built (no module)" in out and "H, 80.0 GiB, compute 9.0" in out
    assert "unknown (no checkout)" in out and "not installed" in out
