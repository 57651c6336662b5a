"""The contest of candidates: what wins, what is left out, what a failure does; on a clock of the test's own."""

import pytest
import torch

import rcmstr_fast.ops  # noqa: F401  declares choices
from rcmstr_fast.config import ConfigError
from rcmstr_fast.timer import Times
from rcmstr_fast.tuning import choices, engine
from rcmstr_fast.tuning.choices import Choice, Setting

CPU = torch.device("cpu")


class Bench:
    """Candidates that take as long as a table says; `noise` alternates above and below."""

    def __init__(self, monkeypatch, ms, noise=0.0):
        self.ms, self.noise, self.now, self.calls = ms, noise, 0.0, []
        monkeypatch.setattr(engine, "measure", self.measure)

    def measure(self, run, device, *, rounds, warm_up):
        value = run()
        self.calls.append(value)
        wobble = 1 + self.noise * (-1) ** (len(self.calls) // 2)
        self.now += (1 + warm_up) * self.ms[value] / 1e3
        return Times((self.ms[value] * wobble,))

    def contest(self, prior, seconds=1e9, settled=str, **makers):
        runs = {value: (lambda value=value: lambda: value) for value in self.ms}
        return engine.contest("demo", prior, {**runs, **makers}, CPU, seconds, settled=settled, clock=lambda: self.now)


def test_the_fastest_wins_and_the_contest_stops_once_that_is_sure(monkeypatch):
    bench = Bench(monkeypatch, {"a": 10.0, "b": 7.0, "c": 9.0})
    out = bench.contest("a")
    assert out.chosen == "b" and out.gain == pytest.approx(10 / 7) and out.why == "faster than the prior"
    assert len(bench.calls) == 3 * engine.LEAST
    assert out.row()["times"]["b"]["ms"] == 7.0


def test_the_prior_stays_where_the_difference_is_noise(monkeypatch):
    out = Bench(monkeypatch, {"a": 10.0, "b": 9.6}, noise=0.1).contest("a")
    assert out.chosen == "a" and out.gain == 1 and "noise" in out.why
    assert Bench(monkeypatch, {"a": 10.0, "b": 9.9}).contest("a").chosen == "a"


def test_hopeless_candidates_are_called_once(monkeypatch):
    bench = Bench(monkeypatch, {"a": 10.0, "b": 9.0, "slow": 1000.0})
    assert bench.contest("a").chosen == "b" and bench.calls.count("slow") == 1
    assert Bench(monkeypatch, {"slow": 1000.0, "b": 9.0}).contest("slow").chosen == "b"


def test_what_is_not_decided_in_time_keeps_the_prior(monkeypatch):
    bench = Bench(monkeypatch, {"a": 100.0, "b": 90.0, "c": 1.0})
    out = bench.contest("a", seconds=0.5)
    assert bench.now <= 0.5 and bench.calls == ["a", "b", "a"]
    assert out.chosen == "a" and out.failed == {"c": "no time was left"} and "not decided" in out.why


def test_where_nothing_can_be_gained_only_the_prior_is_timed(monkeypatch):
    bench = Bench(monkeypatch, {"a": 10.0, "b": 1.0})
    out = bench.contest("a", settled=lambda: "steps wait 0.1% of their time for data")
    assert out.chosen == "a" and bench.calls == ["a"] and out.why.startswith("steps wait") and not out.failed
    assert Bench(monkeypatch, {"a": 10.0, "b": 1.0}).contest("a").chosen == "b"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("ptxas\nfailed"), "ptxas failed"),
    ],
)
@pytest.mark.parametrize("prior", ["a", "bad"])
def test_a_candidate_that_fails_leaves_with_its_reason(monkeypatch, error, says, prior):
    def make():
        raise error

    out = Bench(monkeypatch, {"a": 10.0, "b": 8.0}).contest(prior, bad=make)
    assert out.chosen == "b" and says in out.failed["bad"]


def test_where_all_fail_the_prior_is_taken(monkeypatch):
    def make():
        raise RuntimeError("no")

    out = Bench(monkeypatch, {}).contest("x", x=make)
    assert out.chosen == "x" and out.why == "no candidate could be timed"


def test_values_hold_while_entered_and_are_applied_and_undone(monkeypatch):
    log = []
    monkeypatch.setitem(
        choices._DECLARED,
        "demo.apply",
        Choice(
            "demo.apply",
            "",
            "step",
            1.0,
            lambda s: [1, 2],
            lambda s: 1,
            apply=lambda value: log.append(value) or (lambda: log.append("undone")),
        ),
    )
    with choices.using({"demo.apply": 2, "unknown": "x"}):
        assert choices.value("demo.apply") == 2 and choices.current()["unknown"] == "x" and log == [2]
        with choices.using({"unknown": "y"}):
            assert choices.value("unknown") == "y"
        assert choices.value("unknown") == "x"
    assert choices.value("demo.apply") is None and log == [2, "undone"]


def test_the_largest_expected_gain_comes_first_and_names_are_checked():
    known = choices.of_run(Setting("cpu", calls={"info_nce": ("chunked", "reference")}))
    assert [c.gain for c in known] == sorted((c.gain for c in known), reverse=True)
    names = [c.name for c in known]
    assert "backend.info_nce" in names and choices.named("masked.stages", names) == "masked.stages"
    with pytest.raises(ConfigError, match=r"got masked.stage; did you mean masked.stages\?"):
        choices.named("masked.stage", names)


def test_what_is_declared_is_asked_for(monkeypatch):
    """Each choice changes what the place beside it does, and its prior is what runs without it."""
    from rcmstr_fast import env
    from rcmstr_fast.config import PretrainConfig, TrainConfig
    from rcmstr_fast.data import loader
    from rcmstr_fast.ops.masked import storage
    from rcmstr_fast.ops.queue_losses import chunked
    from rcmstr_fast.train.distributed import World
    from rcmstr_fast.train.switches import decide

    monkeypatch.delenv("RCMSTR_FAST_MASKED_STAGES", raising=False)
    monkeypatch.delenv("RCMSTR_FAST_THREADS", raising=False)
    assert chunked.rows_per_chunk(1 << 12) == 128
    with choices.using({chunked.CHUNK.name: 1 << 20, storage.STAGES.name: 104, "train.cuda_graph": False}):
        assert chunked.rows_per_chunk(1 << 12) == 256
        assert [storage._skips("cpu", sites, 0.9) for sites in (25, 104, 200)] == [True, True, False]
        assert not decide(TrainConfig(), World(torch.device("cuda"))).cuda_graph
        assert decide(TrainConfig(cuda_graph="on"), World(torch.device("cuda"))).cuda_graph
        monkeypatch.setenv("RCMSTR_FAST_MASKED_STAGES", "sparse")
        assert storage._skips("cpu", 200, 0.9)
        monkeypatch.delenv("RCMSTR_FAST_MASKED_STAGES")
    config = PretrainConfig()
    setting = Setting("cpu", 1, 2, 2, config, ((32, 100), (16, 50), (8, 25), (4, 26), (2, 27), (1, 26)), 0.3)
    cuda = Setting("cuda", 1, 2, 2, config, setting.stages, 0.3)
    monkeypatch.setattr(storage.triton_backend, "reasons", list)
    assert storage.STAGES.prior(setting) == 3200 and storage.STAGES.prior(cuda) == 200
    assert list(storage.STAGES.candidates(cuda)) == [200, 0, 26, 54, 104, 800, 3200]
    assert storage.STAGES.show(200) == "sparse up to 200 sites"
    assert loader.WORKERS.prior(setting) == env.threads() and not loader.DECODER.candidates(setting)
    monkeypatch.setenv("RCMSTR_FAST_THREADS", "2")
    assert loader.WORKERS.ordered(setting) == "RCMSTR_FAST_THREADS"
    config.data.workers = 3
    assert loader.WORKERS.ordered(setting) == "data.workers=3"
