"""How many files a reader passes who follows the walks of docs/architecture.md."""

import contextlib
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

import rcmstr_fast
from rcmstr_fast import ops
from rcmstr_fast.config import resolve
from rcmstr_fast.methods import build_method, settings
from rcmstr_fast.models.conv_norm import ConvBN
from rcmstr_fast.ops import Sites, native
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.plan import make_plan
from rcmstr_fast.train.stream import Stream
from tests.train.real import real_config, write_words

ROOT = Path(rcmstr_fast.__file__).parent


@contextlib.contextmanager
def noted(threads=False):
    """The files of the package whose functions run while entered; with `threads` those of threads started by then."""
    found = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            found.add(str(path.relative_to(ROOT)))

    start = threading.setprofile if threads else sys.setprofile
    start(note)
    try:
        yield found
    finally:
        start(None)


@pytest.mark.skipif(bool(native.reasons()), reason=f"{native.reasons()}")
def test_a_masked_unit_on_a_cpu_passes_six_files():
    active = torch.rand(2, 1, 8, 25, generator=torch.Generator().manual_seed(0)) < 0.3
    (sites,) = ops.masked_storage([Sites(active, None)], backend="cpp")
    first, unit = ConvBN(3, 64), ConvBN(64, 64)
    rows = first(torch.zeros(2, 3, 8, 25), sites)
    unit(rows, sites)  # the first unit of a stage makes the lists that the others find
    with noted() as files:
        unit(rows, sites)
    assert files == {
        "models/conv_norm.py",
        "ops/masked/__init__.py",
        "ops/checks.py",
        "ops/masked/layers.py",
        "ops/masked/cpu.py",
        "ops/rows.py",
    }


@pytest.mark.parametrize(("encoder", "most"), [("vit_tiny", 15), ("resnet29", 15)])
def test_from_the_lmdb_to_loss_mim(tmp_path, encoder, most):
    """An operation is one stop and has a walk of its own; plain modules (configuration, random numbers) are none."""
    config = real_config("unused", write_words(tmp_path))
    config.method, config.model.encoder = settings("simmim"), encoder
    config.method.whole_pass = False  # what follows loss_mim
    config = resolve(config)
    stream = Stream(config)
    plan, method = make_plan(config, stream.epoch_size, 1), build_method(config)
    with noted(threads=True) as data:
        batches = stream.batches(0, plan, World(torch.device("cpu"), 0, 1))
        method(next(batches)[0], monitor=False)
    with noted() as files:
        for (batch,) in islice(batches, 1):
            assert "loss_mim" in method(batch, monitor=False).terms
    batches.close()
    rooms = ("data", "train", "methods", "models")
    walked = {file for file in files | data if file.startswith(rooms)}
    assert len(walked) <= most, "\n".join(sorted(walked))
