"""What every method must do on every encoder that it serves (a ViT: the smallest); `-k NAME` for one method."""

import pytest
import torch

from rcmstr_fast.methods import CNN, every_method, find
from rcmstr_fast.train.captured import CapturedStep
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.exported import load_encoder
from rcmstr_fast.train.signals import StopSignals
from tests.methods.harness import COMPARED, CPU, batches, case_config, make_trainer, outcome, take
from tests.train.compare import tensors
from tests.train.launch import launch
from tests.train.tape import TapeRecorder

STEPS = 4


def cases():
    for spec in every_method():
        if spec.method.__module__.startswith("rcmstr_fast."):
            yield from ((spec.name, encoder) for encoder in spec.encoders if encoder in (*CNN, "vit_tiny"))


@pytest.fixture(autouse=True, scope="module")
def plain_operations():
    """Packed rows count their sites on the host; the plain layers are what a recorded step has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCMSTR_FAST_BACKEND", "reference")
        yield


@pytest.fixture(scope="module", params=cases(), ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory):
    """STEPS direct steps."""
    return take(make_trainer(case_config(*case), tmp_path_factory.mktemp("whole")), STEPS)


@pytest.fixture(scope="module")
def exact(case, tmp_path_factory):
    """COMPARED steps in float64 as one micro-batch of one process."""
    return outcome(take(make_trainer(case_config(*case, precision="fp64"), tmp_path_factory.mktemp("one")), COMPARED))


@pytest.fixture(scope="module")
def pairs(request, tmp_path_factory):
    """The same of every selected case in two processes, which are started once."""
    folder = tmp_path_factory.mktemp("two")
    items = [item for item in request.session.items if item.module is request.module and "case" in item.fixturenames]
    wanted = {item.callspec.params["case"] for item in items}
    done = launch("tests.methods.harness", str(folder), *(":".join(case) for case in sorted(wanted)))
    assert [status for status, _ in done] == [0, 0], done
    return folder


def state_of(trainer):
    return tensors({"method": trainer.method.state_dict(), "optimizer": trainer.optimizer.state_dict()})


def assert_bits(one, other):
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_restored_run_goes_on_bit_for_bit(case, whole, tmp_path):
    first = take(make_trainer(case_config(*case), tmp_path), 2)
    with first.state.writing():
        first.state.save(2)
    second = make_trainer(case_config(*case), tmp_path)
    second.step = second.state.restore()
    assert_bits(whole, take(second, STEPS - 2))


def test_recorded_steps_are_direct_ones(case, whole, tmp_path):
    trainer = make_trainer(case_config(*case), tmp_path)

    def changed():
        guard, meter = trainer.guard, trainer.meter
        counts = [guard.total, guard._streak, guard._longest, guard._first, guard._bad_terms, meter.sums]
        kept = [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        held = [*trainer.method.parameters(), *trainer.method.buffers(), trainer.take.requested, *kept, *counts]
        return [x for x in held if x is not None]

    recorder = TapeRecorder(changed)
    trainer.captured = CapturedStep(trainer.take, recorder)
    take(trainer, STEPS)
    assert recorder.calls.count("replay") == 2
    assert_bits(whole, trainer)


def test_micro_batches_are_the_whole_batch(case, exact, tmp_path):
    parts = take(make_trainer(case_config(*case, accumulate=2, precision="fp64"), tmp_path), COMPARED)
    if find(case[0]).accumulates:
        assert_close(exact, outcome(parts))
    else:  # other images of the micro-batch are the negatives
        assert all(torch.isfinite(x).all() for x in outcome(parts).values())


def test_two_processes_are_one(case, exact, pairs):
    assert_close(exact, torch.load(pairs / f"{case[0]}_{case[1]}.pt", weights_only=True))


def test_a_bad_step_leaves_nothing_behind(case, tmp_path):
    trainer = take(make_trainer(case_config(*case), tmp_path), 1)
    before = {name: x.detach().clone() for name, x in trainer.method.named_parameters() if x.requires_grad}
    bad = batches(trainer, 1)
    for view in bad[0].views.values():
        view[1] = float("nan")
    trainer._train_step(bad, StopSignals(), False, False)
    assert int(trainer.guard.total) == 1
    for name, x in trainer.method.named_parameters():
        assert not x.requires_grad or torch.equal(x, before[name]), name
    trainer.step = 2
    take(trainer, 1)
    assert int(trainer.guard.total) == 1
    for name, x in state_of(trainer).items():
        assert torch.isfinite(x.float()).all(), name


def test_the_encoder_is_exported(case, whole, tmp_path):
    export_encoder(whole.method, tmp_path / "encoder.safetensors", whole.config, STEPS)
    encoder, rectifier, header = load_encoder(tmp_path / "encoder.safetensors")
    assert header["config"]["method"]["name"] == case[0] and header["arch"] == case[1]
    images = batches(whole, 0)[0].images.permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = whole.method.exported()
    training = [part for part in parts.values() if part.training]
    with torch.no_grad():
        expected = parts["encoder"].eval()(parts["rectifier"].eval()(images))
        torch.testing.assert_close(encoder(rectifier(images)), expected)
    for part in training:
        part.train()


def test_pictures_and_monitors_come_when_asked(case, whole):
    trainer = whole
    take_set = trainer.take
    take_set.set(trainer.step + 1, 0, 0.0)
    output = trainer.method(batches(trainer, 0)[0], monitor=True, pictures=True)
    assert output.monitors and all(torch.isfinite(x) for x in output.monitors.values()), output.monitors
    # Rows that are all alike, and pictures without detail, are how methods collapse.
    assert any(name.startswith(("spread", "detail")) for name in output.monitors), output.monitors
    assert output.pictures or len(batches(trainer, 0)[0].views) > 1
    for name, sheet in output.pictures.items():
        assert sheet.dim() == 4 and sheet.shape[1] == 3 and sheet.min() >= 0 and sheet.max() <= 1, name
    assert output.loss.dim() == 0 and output.terms and all(not x.requires_grad for x in output.terms.values())
    assert CPU.world_size == 1
