"""`pytest bench --benchmark-only` leaves a record that pages read and a later run compares with; failures are in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.ops import chosen, entry, rows
from bench.ops.entry import Disagreement, Entry
from bench.ops.subjects import PROVIDERS, SIZES, Subject, subjects
from rcmstr_fast.measure import records

ROOT = Path(__file__).resolve().parents[2]
TEN = torch.full((4,), 10.0)


def run(*words):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "bench/test_operations.py", *words]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_record_is_written_and_compared_with(tmp_path):
    words = ["--benchmark-only", "--bench-size=tiny", "-k", "enqueue_"]
    path = tmp_path / "benchmarks.json"
    run(*words, f"--benchmark-json={path}")
    found = records.read(path)
    timed = records.rows_of(found)
    assert {(row["provider"], row["mode"]) for row in timed} == {
        (provider, mode) for provider in ("eager", "ours") for mode in (entry.FORWARD, entry.BOTH)
    }
    assert all(row["ms"] > 0 and row["group"] == "ops" and row["errors"] == [0.0] for row in timed)
    assert "node" not in found["machine_info"] and found["machine_info"]["threads"] and "id" in found["commit_info"]
    said = run(*words, f"--benchmark-compare={path}")
    assert "(NOW)" in said and "Comparing against benchmarks from" in said


def test_a_provider_is_checked_before_it_is_timed():

    calls = []
    good, bad = (lambda g: calls.append("good") or [TEN]), (lambda g: calls.append("bad") or [TEN + 1])
    made = Entry("x", "s", lambda: [TEN.double()], {"good": good, "bad": bad})
    subject = Subject("x s", lambda: made, ("good", "bad", "absent"), (entry.FORWARD,))
    found = {row["provider"]: row for row in rows(subject, "cpu", 2)}
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "ok",
        "bad": "FAIL",
        "absent": "not installed here",
    }
    assert calls.count("bad") == 1 and calls.count("good") == 4 and "ms" not in found["bad"]


def test_errors_are_relative_and_limited():
    made = Entry("x", "s", lambda: [TEN.double()], {"near": lambda g: [TEN * 1.005], "off": lambda g: [TEN * 1.02]})
    assert made.check("near", made.expected()) == [pytest.approx(0.005, rel=1e-3)]
    with pytest.raises(Disagreement, match=r"relative errors 0\.02"):
        made.check("off", made.expected())


@pytest.mark.parametrize("size", SIZES)
def test_subjects_have_names_of_their_own(size):
    names = [subject.name for subject in subjects(size)]
    assert len(set(names)) == len(names) and {name.split()[0] for name in names} <= set(PROVIDERS)
    assert all(len(subject.providers) >= 2 or size == "tiny" for subject in subjects(size))


def test_listed_providers_are_those_of_the_entries():
    for subject in subjects("tiny"):
        if not subject.name.startswith("masked_pass all"):
            everywhere, _ = PROVIDERS[subject.name.split()[0]]
            assert set(subject.build().providers) == set(everywhere), subject.name


def test_subjects_are_chosen_by_text():
    assert [subject.name for subject in chosen("tiny", ["enqueue", "draw"])] == ["draw_masks", "enqueue_"]
    json.dumps([subject.name for subject in chosen("gpu")])
