import json
import logging
import math

import pytest
import torch
from PIL import Image

from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.log import Meter, RunLog, cut_metrics, memory_gib
from rcmstr_fast.train.pictures import contact_sheet
from rcmstr_fast.train.runfolder import RunFolder

WORLD = World(torch.device("cpu"))
YES, NO = torch.tensor(True), torch.tensor(False)


def test_meter_averages_finite_steps_and_starts_anew():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "x": torch.tensor(4.0)}, YES)
    meter.add({"loss": torch.tensor(math.nan), "x": torch.tensor(7.0)}, NO)
    meter.add({"loss": torch.tensor(2.0), "x": torch.tensor(8.0)}, YES)
    assert meter.read(WORLD) == {"loss": 1.5, "x": 6.0}
    meter.add({"loss": torch.tensor(math.inf), "x": torch.tensor(7.0)}, NO)
    assert meter.read(WORLD) == {"loss": None, "x": None}


def test_meter_continues_an_open_window():
    meter, other = Meter(), Meter()
    meter.add({"loss": torch.tensor(1.0)}, YES)
    other.load_state_dict(meter.state_dict(WORLD), WORLD)
    other.add({"loss": torch.tensor(2.0)}, YES)
    assert other.read(WORLD) == {"loss": 1.5}
    other.load_state_dict(Meter().state_dict(WORLD), WORLD)
    assert other.read(WORLD) == {}


def test_metrics_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join([*lines, '{"step": 1, "lo']))
    cut_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_lines_go_to_every_place(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    log = RunLog(folder, WORLD)
    log.begin(0, 10)
    logging.getLogger("rcmstr_fast.data").warning("broken record x")
    log.write({"step": 2, "loss": 0.5, "nothing": None, "bad": math.nan, **log.speed(2, 8, 0.0)})
    log.close()
    line = json.loads(folder.metrics.read_text())
    assert line["loss"] == 0.5 and line["bad"] is None and line["nothing"] is None and line["memory_gib"] > 0
    assert line["images_per_s"] == pytest.approx(16 / line["seconds"], rel=0.5)
    text = folder.text.read_text()
    assert "broken record x" in text and "step 2 loss 0.5" in text and "eta" in text
    assert capsys.readouterr().err == text
    assert not logging.getLogger("rcmstr_fast").handlers


def test_other_processes_write_nothing_but_warnings(tmp_path, capsys):
    log = RunLog(RunFolder(tmp_path), World(torch.device("cpu"), rank=1, world_size=2))
    log.begin(0, 10)
    logging.getLogger("rcmstr_fast.x").info("quiet")
    logging.getLogger("rcmstr_fast.x").warning("loud")
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir()) and "loud" in (err := capsys.readouterr().err) and "quiet" not in err


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = RunLog(RunFolder(tmp_path), WORLD)
    log.begin(3, 10)
    log.advance()
    log.write({"step": 4, "loss": 0.25})
    log.close()
    shown = capsys.readouterr().err
    assert "4/10" in shown and "loss 0.25" in shown and "step 4 loss" not in shown
    assert "step 4 loss 0.25" in RunFolder(tmp_path).text.read_text()


def test_memory_is_in_gib():
    assert 0.01 < memory_gib(torch.device("cpu")) < 100


def test_contact_sheet_places_every_picture():
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(2, 3, 4, 6)
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8).expand(1, 4, 6, 3)
    sheet = contact_sheet({"red": red, "blue": blue}, scale=2)
    assert isinstance(sheet, Image.Image) and sheet.size == (2 * (12 + 4) + 4, 2 * (8 + 4) + 4 + 20)
    banded = contact_sheet({"red": red, "blue": blue, "more": red}, scale=2, across=2)
    assert banded.size == (sheet.width, 2 * (sheet.height - 4) + 4)
    for made, reds in ((sheet, 2), (banded, 4)):
        colours = dict((colour, count) for count, colour in made.getcolors(1000))
        assert colours[255, 0, 0] == reds * 12 * 8 and colours[0, 0, 255] == 12 * 8
    assert colours[0, 0, 0] > 0, "the labels"
