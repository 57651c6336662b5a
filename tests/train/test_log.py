import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.line import due, short
from rcmstr_fast.train.log import Meter, RunLog, cut_metrics, memory_gib
from rcmstr_fast.train.pictures import CAPTIONS, captions_of, contact_sheet
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.toy import toy_run

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
    assert "broken record x" in text and "step 2/10 loss 0.5 " in text and "images/s" in text and "eta" in text
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
    assert "4/10" in shown and "loss 0.25" in shown and "step 4/10 loss" not in shown
    assert "step 4/10 loss 0.25" in RunFolder(tmp_path).text.read_text()


def test_the_text_is_short_while_the_file_has_everything(tmp_path):
    folder = RunFolder(tmp_path)
    log = RunLog(folder, WORLD)
    log.begin(0, 4000)
    line = {
        "loss": 7.123456,
        "alignment_frame": 0.8,
        "alignment_word": 0.6,
        "spread_frame": 0.5,
        "spread_word": 0.9,
        "loss_mim": 0.1,
        "grad_norm": 3.0,
        "images_per_s": 812.0,
        "mfu_percent": 41.2,
        "data_wait_percent": 1.2,
        "nonfinite": 0,
    }
    for step in range(10, 4001, 10):
        log.write({"step": step, **line})
    log.write({"step": 4000, "val_accuracy": 0.25, "val_ned": 0.5, "val_cer": 0.5})
    log.close()
    text = folder.text.read_text().splitlines()
    assert len(folder.metrics.read_text().splitlines()) == 401 and 20 <= len(text) <= 24
    assert (
        text[0]
        .split(" ", 2)[2]
        .startswith(
            "step 10/4000 loss 7.123 alignment 0.70 spread 0.50 812 images/s MFU 41 % waiting for data 1 % eta "
        )
    )
    assert text[-1].endswith("step 4000/4000 validation accuracy 0.25 1-NED 0.5 CER 0.5")


@pytest.mark.parametrize("at_peak", [None, 50.0])
def test_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch, at_peak):
    monkeypatch.setattr("rcmstr_fast.train.loop.images_per_s_at_peak", lambda config, device, bf16: at_peak)
    toy_run(tmp_path / "run", train__steps=4)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.get("mfu_percent") == (at_peak and pytest.approx(100 * line["images_per_s"] / at_peak))
    assert (" MFU " in (tmp_path / "run/log.txt").read_text()) == (at_peak is not None)


def test_what_is_wrong_is_in_the_text():
    wrong = short({"step": 3, "loss": None, "nonfinite": 2, "broken": 5}, 9, "00:01")
    assert wrong == "step 3/9 loss - NOT FINITE: steps 2 broken pictures 5 eta 00:01"
    assert (
        due({"step": 3}, 1000, 2, 61.0) and not due({"step": 3}, 1000, 2, 1.0) and due({"step": 1000}, 1000, 999, 0.0)
    )


def test_what_is_said_before_the_folder_is_claimed_is_kept(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    log = RunLog(folder, WORLD)
    logging.getLogger("rcmstr_fast.x").warning("early")
    assert not folder.path.exists() and "early" in capsys.readouterr().err
    folder.path.mkdir()
    log.open()
    logging.getLogger("rcmstr_fast.x").warning("late")
    assert [line.split()[-1] for line in folder.text.read_text().splitlines()] == ["early", "late"]
    log.open()
    log.close()
    refused = RunLog(RunFolder(tmp_path / "other"), WORLD)
    logging.getLogger("rcmstr_fast.x").warning("unheard")
    refused.close()
    assert not (tmp_path / "other").exists() and not logging.getLogger("rcmstr_fast").handlers


class Gone(io.StringIO):
    """A terminal whose other side has gone."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Gone(), None], ids=["gone", "none"])
def test_a_dead_terminal_is_said_once_in_the_text(tmp_path, monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    folder = RunFolder(tmp_path)
    log = RunLog(folder, WORLD)
    log.begin(0, 10)
    for step in range(3):
        log.advance()
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert len(folder.metrics.read_text().splitlines()) == 3
    text = folder.text.read_text()
    assert text.count("step ") == 3 and text.count("the console is gone") == (stream is not None)


def test_tensorboard_that_cannot_be_written_is_said_once(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.tensorboard.write_text("a file")
    log = RunLog(folder, WORLD)
    log.begin(0, 10)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert len(folder.metrics.read_text().splitlines()) == 3
    assert folder.text.read_text().count("tensorboard cannot be written (") == 1


def test_tensorboard_that_fails_later_is_said_once(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    log = RunLog(folder, WORLD)
    log.begin(0, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    with log.observing("views.png"):
        full()
    log.close()
    told = folder.text.read_text()
    assert told.count("tensorboard cannot be written ([Errno 28] No space left on device)") == 1
    assert told.count("views.png cannot be written") == 1


def test_a_full_disk_under_the_text_and_the_metrics(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.text.symlink_to("/dev/full")
    folder.metrics.symlink_to("/dev/full")
    log = RunLog(folder, WORLD)
    log.total = 10
    log.open()
    log._metrics = open(folder.metrics, "a")  # noqa: SIM115 (closed by close)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    told = capsys.readouterr().err
    assert told.count("log.txt cannot be written") == 1 and told.count("metrics.jsonl cannot be written") == 1
    assert all(told.count(f"step {step}/10 loss 1") == 1 for step in range(3))


def test_memory_is_in_gib():
    assert 0.01 < memory_gib(torch.device("cpu")) < 100


def test_contact_sheet_places_every_picture():
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(2, 3, 4, 6)
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8).expand(1, 4, 6, 3)
    sheet = contact_sheet({"red": red, "blue": blue}, scale=2)
    assert isinstance(sheet, Image.Image) and sheet.height == 2 * (8 + 4) + 4 + 20
    wide = contact_sheet({"red": red.repeat(1, 1, 1, 10), "blue": blue}, scale=2)
    assert wide.size == (2 * (120 + 4) + 4, sheet.height)
    banded = contact_sheet({"red": red, "blue": blue, "more": red}, scale=2, across=2)
    assert banded.height == 2 * (sheet.height - 4) + 4
    widest = {name: red.repeat(1, 1, 1, 10) for name in ("red", "blue", "more")}
    assert contact_sheet(widest, scale=2, across=2).size == (wide.width, banded.height)
    for made, reds in ((sheet, 2), (banded, 4)):
        colours = dict((colour, count) for count, colour in made.getcolors(1000))
        assert colours[255, 0, 0] == reds * 12 * 8 and colours[0, 0, 255] == 12 * 8
    assert colours[0, 0, 0] > 0, "the labels"


def test_labels_of_narrow_columns_stand_apart():
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(2, 3, 4, 6)
    sheet = np.asarray(contact_sheet({"crop_columns": red, "sharpen": red}, scale=2).convert("L"))
    second = sheet.shape[1] // 2 + 2
    assert (sheet[:24, second - 6 : second] == 255).all(), "nothing is written where the second column begins"
    assert sheet[:24, :second].min() < 100 and sheet[:24, second:].min() < 100


def test_captions_explain_every_column():
    names = ["original", "blur", "rotate", "query", "one masked", "reconstruction"]
    lines = captions_of(names)
    assert [line.split(":")[0] for line in lines] == ["original", "blur, rotate", *names[3:]]
    assert lines[4 - 1].endswith(CAPTIONS["masked"])
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(2, 3, 4, 6)
    plain, told = contact_sheet({"query": red}), contact_sheet({"query": red}, captions=lines)
    assert told.height == plain.height + 20 * len(lines) and told.width > plain.width
    below = told.crop((0, plain.height, told.width, told.height))
    assert below.getcolors(100_000) and min(colour for _, colour in below.getcolors(100_000)) == (0, 0, 0)
