"""Damaged checkpoints, encoders, recognisers and configurations: taken, or refused in one line; nothing is executed."""

import contextlib
import io
import json
import random
import zipfile
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
import yaml

from rcmstr_fast.charset import Charset
from rcmstr_fast.cli.main import main as command
from rcmstr_fast.config import ConfigError, ModelConfig, RunError
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train import loop
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.exported import load_encoder
from rcmstr_fast.train.runfolder import RunFolder
from tests.fuzz.mutate import changed, damaged
from tests.train.toy import toy_config, toy_run


def _refused(action) -> str:
    try:
        action()
    except (ConfigError, RunError) as error:
        assert "\n" not in str(error), error
        return "refused"
    return "taken"


class Checkpoints:
    """last.pt of a finished run: its bytes, a part of its archive with the right sums, or its values."""

    def __init__(self, folder: Path) -> None:
        self.run = toy_run(folder / "run", train__steps=2)
        self.last = RunFolder(self.run).last
        self.data = self.last.read_bytes()
        self.state = torch.load(self.last, weights_only=True)
        self.last.with_name("previous.pt").unlink(missing_ok=True)

    def attempt(self, drawn: random.Random) -> str:
        kind = drawn.randrange(3)
        if kind == 0:
            data = damaged(self.data, drawn)
        elif kind == 1:
            data = self._repacked(drawn)
        else:
            buffer = io.BytesIO()
            torch.save(changed(self.state, drawn), buffer)
            data = buffer.getvalue()
        self.last.write_bytes(data)
        with contextlib.redirect_stderr(io.StringIO()):
            return _refused(lambda: toy_run(self.run, train__steps=2))

    def _repacked(self, drawn: random.Random) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, damaged(part, drawn) if name.endswith("data.pkl") else part)
        return buffer.getvalue()


class Encoders:
    """encoder.safetensors: its header's values, or its bytes."""

    key = "rcmstr_fast"

    def __init__(self, folder: Path) -> None:
        self.file = folder / "file.safetensors"
        self._write()
        self.data = self.file.read_bytes()
        size = int.from_bytes(self.data[:8], "little")
        self.header = json.loads(self.data[8 : 8 + size])["__metadata__"]
        self.tensors = safetensors.torch.load(self.data)
        self.end = 8 + size

    def _write(self) -> None:
        config = toy_config("x", model__encoder="resnet29", model__width=0.25)
        method = mock.Mock()
        method.exported.return_value = {
            "encoder": build_encoder(config.model),
            "rectifier": build_rectifier(config.model),
        }
        export_encoder(method, self.file, config, 7)

    def _load(self) -> object:
        return load_encoder(self.file)

    def attempt(self, drawn: random.Random) -> str:
        if drawn.random() < 0.5:
            data = damaged(self.data, drawn, self.end)
        else:
            held = changed(json.loads(self.header[self.key]), drawn)
            text = json.dumps(held, default=str, skipkeys=True)
            tensors = dict(self.tensors)
            if drawn.random() < 0.3:
                name = drawn.choice(list(tensors))
                tensors[name] = torch.zeros(drawn.choice(((), (0,), (3,), (1, 2, 3))))
            data = safetensors.torch.save(tensors, {self.key: text})
        self.file.write_bytes(data)
        return _refused(self._load)


class Recognisers(Encoders):
    """recogniser.safetensors in the same way."""

    def _write(self) -> None:
        model = ModelConfig(encoder="resnet29", width=0.25)
        made = Recogniser(model, build_rectifier(model), build_encoder(model), "ctc", Charset("36"), hidden=8)
        made.save(self.file, {})

    def _load(self) -> object:
        return load_recogniser(self.file)


class Configurations:
    """A --config file and the config.yaml of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.yaml"
        run = toy_run(folder / "run", train__steps=1)
        self.tree = yaml.safe_load(RunFolder(run).config.read_text())
        self.data = RunFolder(run).config.read_bytes()
        self.run = RunFolder(run)

    def attempt(self, drawn: random.Random) -> str:
        if drawn.random() < 0.4:
            data = damaged(self.data, drawn)
        else:
            data = yaml.dump(changed(self.tree, drawn), Dumper=yaml.SafeDumper).encode()
        self.file.write_bytes(data)
        errors = io.StringIO()
        with mock.patch.object(loop, "pretrain", lambda config: None), contextlib.redirect_stderr(errors):
            status = command(["pretrain", "--config", str(self.file)])
        assert status in (0, 2) and errors.getvalue().count("\n") == (status == 2), errors.getvalue()
        self.run.config.write_bytes(data)
        held = _refused(lambda: self.run.adopt(loop.resolve(toy_config(self.run.path, train__steps=1))))
        return "taken" if status == 0 or held == "taken" else "refused"
