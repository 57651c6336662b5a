"""docs/new-method.md is a whole method: its code block is a file of its own, and nothing else is touched."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from rcmstr_fast.cli.main import main
from rcmstr_fast.methods import registry
from rcmstr_fast.train import loop
from tests.methods.harness import case_config, make_trainer, take

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new-method.md"


@pytest.fixture
def twins(tmp_path):
    """The module of the page, imported from a file."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code.count("\n") <= 60
    path = tmp_path / "twins.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("twins", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["twins"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["twins"]
    del registry._known["twins"]


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_it_trains(twins, encoder, tmp_path):
    trainer = take(make_trainer(case_config("twins", encoder), tmp_path), 2)
    means = trainer.meter.read(trainer.world)
    assert -1 <= means["loss_twins"] <= 1 and int(trainer.guard.total) == 0


def test_the_command_line_knows_it(twins, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "pretrain", seen.append)
    assert main(["pretrain", "--method.name", "twins", "--method.windows", "4"]) == 0
    assert isinstance(seen[0].method, twins.TwinsConfig) and seen[0].method.windows == 4
    with pytest.raises(SystemExit):
        main(["pretrain", "--method.name", "twins", "--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "width of projector and predictor; at least 1." in page and "--method.queue_size" not in page
    assert main(["methods"]) == 0
    assert "twins" in capsys.readouterr().out
