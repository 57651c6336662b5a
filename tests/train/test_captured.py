"""Recorded steps equal direct ones, bit for bit, and nothing in a step waits for the device."""

import contextlib
import itertools

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.config import ConfigError, RunError, TrainConfig
from rcmstr_fast.methods import Batch, build_method
from rcmstr_fast.methods.permutation import permuted_order
from rcmstr_fast.train import captured as module
from rcmstr_fast.train import distributed
from rcmstr_fast.train.captured import CapturedStep
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.plan import make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.switches import decide
from rcmstr_fast.train.trainer import Trainer
from tests.methods.tiny import random_batch, tiny_config
from tests.train.compare import tensors
from tests.train.launch import launch
from tests.train.tape import HostWaits, NoWaiting, TapeRecorder

CPU = World(torch.device("cpu"))
STEPS_AN_EPOCH = 3


@pytest.fixture(autouse=True)
def plain_operations(monkeypatch):
    """Packed rows count their sites on the host, which exists on a CPU only; the plain layers are what a GPU runs."""
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "reference")


def make_trainer(folder, encoder="resnet29", world=CPU, accumulate=1, optim=None, **method):
    config = tiny_config(encoder, **method)
    config.run = str(folder)
    config.train.accumulate, config.train.precision, config.train.steps = accumulate, "fp32", 100
    config.optim.lr, config.optim.warmup_steps = 1e-3, 4
    for name, value in (optim or {}).items():
        setattr(config.optim, name, value)
    plan = make_plan(config, STEPS_AN_EPOCH * config.train.global_batch_size, 1)
    return Trainer(config, plan, world, RunFolder(folder), build_method(config, world), None)


def batches(trainer, step, batch=None):
    """The micro-batches of a step; epochs change every few steps."""
    parts = trainer.config.train.accumulate
    made = []
    for part in range(parts):
        noise = random_batch(trainer.config, batch or trainer.plan.micro_batch, seed=step * parts + part)
        device = trainer.world.device
        views = {name: view.to(device) for name, view in noise.views.items()}
        more, drawn = permuted(trainer, noise, step)
        made.append(Batch(views | more, noise.index.to(device), step // STEPS_AN_EPOCH, drawn))
    return made


def permuted(trainer, batch, step):
    """The permuted query view and its order, as the stream makes them."""
    config, device = trainer.config, trainer.world.device
    if not config.method.permute or config.method.division == "vertical_projection":
        return {}, {}
    order = permuted_order(batch.index, step // STEPS_AN_EPOCH, config.method, config.seed)
    strips = {"num_patches": config.method.num_patches, "group_size": config.method.group_size}
    shuffled = ops.permute_strips(batch.views["query"], order, **strips)
    return {"permuted": shuffled.to(device)}, {"order": order.to(device)}


def all_state(trainer):
    """Every tensor that a step changes but for gradients."""
    guard, meter = trainer.guard, trainer.meter
    counts = [guard.total, guard._streak, guard._longest, guard._first, guard._bad_terms, meter.sums]
    optimizer = [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    held = [*trainer.method.parameters(), *trainer.method.buffers(), trainer.take.requested, *optimizer, *counts]
    return [x for x in held if x is not None]


def tape(trainer):
    """Let the trainer record its steps on a tape."""
    recorder = TapeRecorder(lambda: all_state(trainer))
    trainer.captured = CapturedStep(trainer.take, recorder)
    return recorder


def take(trainer, steps, monitor_every=2):
    """Steps as the loop takes them; monitors of each."""
    shown = []
    for step in range(trainer.step, trainer.step + steps):
        monitors = trainer._train_step(batches(trainer, step), StopSignals(), step % monitor_every == 0, False)
        trainer.step = step + 1
        shown.append({name: float(value) for name, value in monitors.items()})
    return shown


def assert_equal_state(one, other):
    names = {"method": lambda t: t.method.state_dict(), "optimizer": lambda t: t.optimizer.state_dict()}
    for part, state in names.items():
        a, b = tensors(state(one)), tensors(state(other))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), f"{part} {name}"
    assert torch.equal(one.guard.state(), other.guard.state())
    assert one.meter.read(CPU) == other.meter.read(CPU)


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("resnet29", {"name": "rcmstr", "bn_group_size": 2}),
        ("resnet29", {"name": "rclstr", "preset": "rclstr_code", "optim": {"clip": 0.5}}),
        ("vit_tiny", {"name": "rcmstr", "accumulate": 2, "batch": 8, "enqueue_per_image": 3}),
        ("vit_tiny", {"name": "seqmoco"}),
    ],
    ids=str,
)
def test_replayed_steps_equal_direct_ones(tmp_path, encoder, options):
    direct, replayed = (make_trainer(tmp_path / name, encoder, **options) for name in ("direct", "replayed"))
    recorder = tape(replayed)
    assert take(direct, 8) == take(replayed, 8)
    assert recorder.calls.count("record") == 2 and recorder.calls.count("replay") == 6
    assert_equal_state(direct, replayed)


@pytest.fixture
def pair(monkeypatch):
    """Two processes that compute the same, in this one: gathered rows come twice, sums are doubled."""

    class Done:
        def wait(self):
            pass

    def all_reduce(x, group=None, async_op=False):
        x.mul_(2)
        return Done()

    monkeypatch.setattr(distributed, "_all_gather", lambda whole, mine: whole.copy_(torch.cat([mine, mine])))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *given, **options: None)
    return World(torch.device("cpu"), 0, 2)


@pytest.mark.parametrize(
    ("encoder", "options", "exchanges"),
    [
        ("resnet29", {"name": "rcmstr", "queue": "sharded"}, 6),  # hidden pixels, three queues, gradients, keys
        ("vit_tiny", {"name": "rclstr", "accumulate": 2, "batch": 8}, 2),
    ],
    ids=str,
)
def test_exchanges_part_a_recording_and_nothing_else_changes(tmp_path, pair, encoder, options, exchanges):
    direct, replayed = (make_trainer(tmp_path / name, encoder, pair, **options) for name in ("direct", "replayed"))
    recorder = tape(replayed)
    assert take(direct, 6) == take(replayed, 6)
    assert recorder.calls.count("record") == 2 and recorder.calls.count("replay") == 4
    assert recorder.parts == 2 * exchanges + 1
    assert_equal_state(direct, replayed)


def test_two_processes_replay_what_they_compute_directly():
    done = launch("tests.train.replayed")
    assert [status for status, _ in done] == [0, 0], done


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that only note what happens to them."""
    events, number = [], itertools.count()

    class Graph:
        def __init__(self):
            self.name = next(number)

        def replay(self):
            events.append(f"replay {self.name}")

    @contextlib.contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        events.append(f"begin {graph.name}")
        yield
        events.append(f"end {graph.name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return events


def test_graphs_and_exchanges_alternate(graphs):
    recorder = module.GraphRecorder(torch.device("cuda"))
    result, again = recorder.record(lambda: distributed.exchange(lambda: graphs.append("sum")) or ({}, {}))
    assert result == ({}, {}) and graphs == ["begin 0", "end 0", "begin 1", "end 1"]  # nothing is exchanged yet
    graphs.clear()
    again()
    again()
    assert graphs == ["replay 0", "sum", "replay 1"] * 2
    _, alone = recorder.record(lambda: ({}, {}))
    graphs.clear()
    alone()
    assert graphs == ["replay 2"] and not distributed.recording()


def test_a_recording_that_fails_is_left(graphs):
    with pytest.raises(ZeroDivisionError):
        module.GraphRecorder(torch.device("cuda")).record(lambda: 1 / 0)
    assert not distributed.recording()


def test_an_exchange_inside_backward_cannot_be_recorded(pair):
    rows = torch.ones(2, 3, requires_grad=True)
    pair.gather_with_grad(rows).sum().backward()
    with distributed.recorded(lambda exchange: None), pytest.raises(RunError, match="cuda_graph=on: the gradients"):
        pair.gather_with_grad(rows).sum().backward()


def test_a_restored_run_records_anew_and_goes_on_exactly(tmp_path):
    whole = make_trainer(tmp_path / "whole", name="rclstr")
    first = make_trainer(tmp_path / "run", name="rclstr")
    tape(first)
    take(whole, 9)
    take(first, 4)
    with first.state.writing():
        first.state.save(4)
    second = make_trainer(tmp_path / "run", name="rclstr")
    recorder = tape(second)
    second.step = second.state.restore()
    take(second, 5)
    assert recorder.calls[-1] == "replay"
    assert_equal_state(whole, second)


def test_another_shape_is_recorded_anew(tmp_path):
    direct, replayed = (make_trainer(tmp_path / name, name="seqmoco") for name in ("direct", "replayed"))
    recorder = tape(replayed)
    for trainer in (direct, replayed):
        for step, size in enumerate((4, 4, 4, 4, 6, 6, 6, 6, 4)):
            trainer._train_step(batches(trainer, step, size), StopSignals(), False, False)
            trainer.step = step + 1
    assert recorder.calls == [
        *["forget", "direct", "direct", "record", "record", "replay", "replay"] * 2,
        "forget",
        "direct",
    ]
    assert_equal_state(direct, replayed)


@pytest.mark.parametrize("drawn", [False, True])
def test_no_direct_step_runs_beside_recordings(tmp_path, drawn):
    """Monitors come late and pictures last: activations must not be held twice, by a recording and by a direct step."""
    trainer = make_trainer(tmp_path, name="seqmoco")
    recorder = tape(trainer)
    take(trainer, 6, monitor_every=5)
    trainer._draw = lambda *_: None
    trainer._train_step(batches(trainer, 6), StopSignals(), True, drawn)
    first = recorder.calls.index("record")
    assert "direct" not in recorder.calls[first:]
    assert (recorder.calls[-1] == "forget") == drawn


def test_a_bad_step_changes_nothing_when_replayed(tmp_path):
    trainer = make_trainer(tmp_path, name="rclstr")
    tape(trainer)
    take(trainer, 5, monitor_every=100)
    before = {name: x.clone() for name, x in trainer.method.online.state_dict().items()}
    bad = batches(trainer, 5)
    bad[0].views["query"][1] = float("nan")
    trainer._train_step(bad, StopSignals(), False, False)
    for name, x in trainer.method.online.state_dict().items():
        assert torch.equal(x, before[name]) or name.endswith("num_batches_tracked"), name
    assert int(trainer.guard.total) == 1 and int(trainer.guard._first) == 6


SWITCHES = [
    ("rclstr", {"division": "drop_boundary"}),
    ("rclstr", {"division": "vertical_projection"}),
    ("rclstr", {"inter_loss": "re", "inter_pairing": "pool"}),
    ("rcmstr", {"coupled": True, "norm_pix": True, "mask_rule": "any"}),
    ("rcmstr", {"enqueue_per_image": 3, "bn_group_size": 2, "optim": {"name": "sgd", "clip": 1.0}}),
]


@pytest.mark.parametrize(("name", "options"), SWITCHES, ids=str)
def test_no_step_waits_for_the_device(tmp_path, name, options):
    trainer = make_trainer(tmp_path, name=name, **options)
    trainer.method.online.rectifier.train()
    with NoWaiting():
        for step in range(2):
            trainer._train_step(batches(trainer, step), StopSignals(), True, False)


def test_the_check_sees_a_wait():
    x = torch.arange(3)
    for read in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x[0] == 0), x.nonzero, lambda: x[x > 1]):
        with NoWaiting(), pytest.raises(HostWaits):
            read()


@pytest.mark.parametrize(
    ("fields", "world", "says"),
    [
        ({"cuda_graph": "on"}, CPU, "cuda_graph=on needs a CUDA GPU, this run is on cpu"),
        ({"compile": "on", "checkpoint_activations": True}, CPU, "cannot be combined"),
    ],
)
def test_switches_that_cannot_be_are_refused(fields, world, says):
    with pytest.raises(ConfigError, match=says):
        decide(TrainConfig(**fields), world)


def test_auto_records_on_one_gpu_only():
    auto = TrainConfig()
    assert not decide(auto, CPU).cuda_graph and decide(auto, World(torch.device("cuda"))).cuda_graph
    several = World(torch.device("cuda"), 0, 2)
    assert not decide(auto, several).cuda_graph and decide(TrainConfig(cuda_graph="on"), several).cuda_graph
    assert not decide(TrainConfig(cuda_graph="off"), World(torch.device("cuda"))).cuda_graph
    assert decide(TrainConfig(compile="on"), CPU).compile and not decide(auto, CPU).compile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_graphs_follow_direct_steps_on_a_gpu(tmp_path, monkeypatch, encoder):
    monkeypatch.delenv("RCMSTR_FAST_BACKEND")
    world = World(torch.device("cuda", 0))
    direct, replayed = (make_trainer(tmp_path / n, encoder, world, name="rcmstr") for n in ("direct", "replayed"))
    direct.captured = None
    assert replayed.captured is not None and module.WARM_UP < 8
    torch.cuda.synchronize()
    for trainer in (direct, replayed):
        for step in range(8):
            ready = batches(trainer, step)
            torch.cuda.set_sync_debug_mode("default" if step == module.WARM_UP else "error")
            try:
                trainer._train_step(ready, StopSignals(), False, False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            trainer.step = step + 1
    a, b = (t.meter.read(world)["loss"] for t in (direct, replayed))
    assert a == pytest.approx(b, rel=1e-3)
