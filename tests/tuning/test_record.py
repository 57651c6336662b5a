"""The file of what is known: kept whole, shared by processes, and ignored with one line where it is not ours."""

import json
import logging
import multiprocessing
import os

import pytest
import torch

from rcmstr_fast.tuning import record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record, "_told", set())
    return tmp_path / "cache"


def put(name, value="found"):
    return record.update(CPU, lambda mine: mine["runs"].update({name: {"values": {"x": value}}}))


def test_what_is_kept_is_read_again(folder):
    assert record.read(CPU)["runs"] == {}
    assert put("one") and put("two")
    assert list(record.read(CPU)["runs"]) == ["one", "two"] and [p.name for p in folder.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("change", ["device", "torch", "driver", "digest"])
def test_another_machine_or_version_counts_for_nothing_but_stays(monkeypatch, caplog, change):
    put("one")
    other = record.machine(CPU) | {change: "another"}
    monkeypatch.setattr(record, "machine", lambda device: other)
    with caplog.at_level(logging.INFO):
        assert record.read(CPU)["runs"] == {} and record.read(CPU)["checks"] == {}
    assert len(caplog.records) == 1 and "another machine or version" in caplog.text
    put("two")
    assert list(record.read(CPU)["runs"]) == ["two"]
    monkeypatch.undo()


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 0, "machines": {}}', "[]", "\x00", '{"format": 1}', '{"format": 1, "machines": 3}']
)
def test_a_file_that_is_cut_or_older_is_ignored_with_a_line_and_replaced(folder, caplog, text):
    folder.mkdir()
    record.path().write_text(text)
    with caplog.at_level(logging.INFO):
        assert record.read(CPU)["runs"] == {}
    assert len(caplog.records) == 1 and "ignored" in caplog.text
    assert put("one") and list(record.read(CPU)["runs"]) == ["one"]


def test_an_entry_of_another_shape_counts_for_nothing(folder):
    put("one")
    held = json.loads(record.path().read_text())
    for mine in held["machines"].values():
        mine["runs"] = {"one": 3}
    record.path().write_text(json.dumps(held))
    assert record.read(CPU)["runs"] == {}


def test_a_cache_path_that_is_a_file_costs_one_warning(folder, caplog):
    folder.write_text("mine")
    assert not put("one") and not put("two")
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "cannot be kept" in caplog.text
    assert folder.read_text() == "mine" and record.read(CPU)["runs"] == {}


def test_a_full_disk_leaves_the_file_as_it_was(monkeypatch, caplog):
    put("one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not put("two") and "No space left on device" in caplog.text
    assert list(record.read(CPU)["runs"]) == ["one"] and len(list(record.path().parent.iterdir())) == 1


def write_many(first):
    for number in range(first, first + 8):
        put(f"run {number}")


def test_two_processes_that_write_at_once_both_keep_what_they_found():
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(first,)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(record.read(CPU)["runs"]) == 16
