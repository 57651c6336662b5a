"""Steps recorded once and replayed: the whole step is one CUDA graph, or with several processes a few.

A recorded step reads and writes the same memory every time, so the batch is copied into buffers of its own before each
replay. There are two kinds of steps, with and without monitors. One step of each runs directly, which is also what
warms up libraries and tuners; then both are recorded. A direct step after a recording would need memory for its
activations beside that of the recordings, so that a batch which fits would not fit any more. Other shapes make
everything be recorded anew.

A graph holds no exchange between processes. Each one parts the recording: a step is then forward, backward and packing
of the gradients, their sum over the processes, the update, the exchange of keys, and what follows it. A replay goes
through graphs and exchanges in that order, without a launch of the host in between but for theirs.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch

from rcmstr_fast.methods.protocol import Batch
from rcmstr_fast.train.distributed import Exchange, recorded
from rcmstr_fast.train.step import Shown

#: Least number of steps that run directly before both kinds are recorded: one of each.
WARM_UP = 2

Run = Callable[[], Shown]


class Recorder(Protocol):
    """Where recorded steps live."""

    def direct(self, run: Run) -> Shown:
        """Run now, in the place where steps are recorded."""
        ...

    def record(self, run: Run) -> tuple[Shown, Callable[[], None]]:
        """Record `run` without any effect; its result, which each call of the second value computes anew."""
        ...

    def forget(self) -> None:
        """Nothing recorded so far will be replayed again."""
        ...


def replay(parts: list[Exchange]) -> None:
    """Graphs and exchanges in their order."""
    for part in parts:
        part()


class GraphRecorder:
    """Records CUDA graphs on a stream of its own; all share one pool of memory.

    Sharing is safe because replays follow each other on one stream and no graph reads what another one has made
    but parameters, optimiser and the like, which live outside the pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def direct(self, run: Run) -> Shown:
        """Run on the stream of the recordings, between the work before and after it on the current one."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = run()
        outside.wait_stream(self.stream)
        return result

    def record(self, run: Run) -> tuple[Shown, Callable[[], None]]:
        """Record on the same stream; threads that load data meanwhile may use the device."""
        parts: list[Exchange] = []
        with contextlib.ExitStack() as graph:

            def begin() -> None:
                made = torch.cuda.CUDAGraph()
                graph.enter_context(
                    torch.cuda.graph(made, pool=self._pool, stream=self.stream, capture_error_mode="thread_local")
                )
                parts.append(made.replay)

            def part(exchange: Exchange) -> None:
                graph.close()
                parts.append(exchange)
                begin()

            begin()
            with recorded(part):
                result = run()
        return result, lambda: replay(parts)

    def forget(self) -> None:
        """Take a fresh pool; the old one goes with its last graph."""
        self._pool = torch.cuda.graph_pool_handle()


class CapturedStep:
    """A step that is replayed from its third call on.

    Args:
        step: takes micro-batches and whether to compute monitors; a function of tensors (see `train.step`).
        recorder: records it.
    """

    def __init__(self, step: Callable[[list[Batch], bool], Shown], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._inputs: list[Batch] = []
        self._kind: list[tuple] = []
        self._warm: set[bool] = set()
        self._recorded: dict[bool, tuple[Shown, Callable[[], None]]] = {}

    def __call__(self, micro: list[Batch], monitor: bool) -> Shown:
        """Take the step; the tensors of the result are overwritten by the next one."""
        self._fill(micro)
        if len(self._warm) < WARM_UP:
            # A step that was not asked for monitors computes them all the same where no step has yet.
            kind = monitor or True not in self._warm
            self._warm.add(kind)
            monitors, pictures = self._recorder.direct(lambda: self._step(self._inputs, kind))
            return (monitors if kind == monitor else {}), pictures
        if not self._recorded:
            for kind in (True, False):  # the larger first: the other finds its memory in the pool
                self._recorded[kind] = self._record(kind)
        result, replay = self._recorded[monitor]
        replay()
        return result

    def _record(self, kind: bool) -> tuple[Shown, Callable[[], None]]:
        return self._recorder.record(lambda: self._step(self._inputs, kind))

    def forget(self) -> None:
        """Record anew: tensors that a step works on have been replaced, or a step outside needs the memory."""
        self._kind, self._inputs, self._warm, self._recorded = [], [], set(), {}
        self._recorder.forget()

    def _fill(self, micro: list[Batch]) -> None:
        """Copy the batch into the buffers that recorded steps read."""
        kind = [_kind(batch) for batch in micro]
        if kind != self._kind:
            self.forget()
            self._kind = kind
            self._inputs = [_empty_like(batch) for batch in micro]
        for held, batch in zip(self._inputs, micro, strict=True):
            places = held.tensors()
            for name, x in batch.tensors().items():
                places[name].copy_(x)


def _empty_like(batch: Batch) -> Batch:
    """A batch of the same shapes, with the step's own epoch and progress, whose memory never changes."""
    views, drawn = ({name: torch.empty_like(x) for name, x in found.items()} for found in (batch.views, batch.drawn))
    return Batch(views, torch.empty_like(batch.index), batch.epoch, drawn, progress=batch.progress)


def _kind(batch: Batch) -> tuple:
    """What a recording depends on."""
    return tuple((name, x.shape, x.stride(), x.dtype, x.device) for name, x in batch.tensors().items())
