"""Steady state of a main loop on a quarter of a multiprocessor, instruction by instruction, in order.

Each warp issues its instructions in their order, one a cycle and scheduler, once their operands are there and their
pipe is free. Products of wgmma queue up behind each other and are waited for by groups; barriers hold all warps of a
program. Loads from global memory are taken as in time (they are asynchronous and some steps ahead). Latencies are
published microbenchmarks, rounded; nothing is calibrated against a measurement, so trust ratios more than times.

Programs that share a multiprocessor fall into step with each other, and how well they then overlap depends on when they
began: the figure is the mean over several beginnings.
"""

from bench.aot.sass import HOLDS, Instruction

#: Cycles from issue to a usable result.
LATENCY = {"fma": 4, "imad": 4, "alu": 5, "mufu": 20, "uniform": 8, "shared": 28, "global": 6, "other": 6, "tensor": 33}
#: When the programs of a multiprocessor begin, one after the other: shares of the time that an iteration takes to issue.
BEGINNINGS = (0.0, 0.25, 0.5, 0.75)
#: From the end of a wgmma to its visible result; from the last arrival at a barrier to going on.
DRAIN, BARRIER = 24, 20


class _Warp:
    """Where a warp stands."""

    def __init__(self, program: int) -> None:
        self.program, self.at, self.rounds, self.next = program, 0, 0, 0.0
        self.waiting = False
        self.ready: dict[str, float] = {}
        self.groups: list[float] = []
        self.last = 0.0


class _Quarter:
    """One scheduler with its pipes and its share of the multiprocessor's."""

    def __init__(self, body: list[Instruction], programs: int, warps: int, architecture: int) -> None:
        self.body, self.holds = body, HOLDS[architecture]
        self.each = max(1, warps // 4)
        self.warps = [_Warp(p) for p in range(programs) for _ in range(self.each)]
        self.free: dict[str, float] = {}
        self.now = 0.0

    def start(self, warp: _Warp) -> float:
        """Earliest cycle at which the warp's next instruction can issue."""
        one = self.body[warp.at]
        time = max(warp.next, self.now)
        for name in one.reads:
            time = max(time, warp.ready.get(name, 0.0))
        for name in one.writes:
            time = max(time, warp.ready.get(name, 0.0))
        if one.op.startswith("WARPGROUP.DEPBAR"):
            left = int(one.text.rsplit(",", 1)[1].strip(), 16)
            done = warp.groups[-1 - left] if len(warp.groups) > left else 0.0
            return max(time, done + DRAIN if done else 0.0)
        if not one.op.startswith("HGMMA"):
            time = max(time, self.free.get(_pipe(one), 0.0))
            if one.bytes:
                time = max(time, self.free.get("bytes", 0.0))
        return time

    def issue(self, warp: _Warp, time: float) -> None:
        """Issue it."""
        one = self.body[warp.at]
        if one.op.startswith("HGMMA"):
            begin = max(time, self.free.get("tensor", 0.0))
            warp.last = self.free["tensor"] = begin + max(one.tensor, one.bytes / 128)
            if "gsb0" in one.text:
                warp.groups.append(warp.last)
                del warp.groups[:-8]
        elif one.op.startswith("BAR"):
            self._arrive(warp, time)
        else:
            pipe = _pipe(one)
            self.free[pipe] = time + (one.tensor or self.holds.get(pipe, 1))
            if one.bytes:  # the four quarters share 128 bytes a cycle
                self.free["bytes"] = max(self.free.get("bytes", 0.0), time) + 4 * one.bytes / 128
            for name in one.writes:
                warp.ready[name] = time + LATENCY.get(one.pipe, 4)
        warp.next, self.now = max(warp.next, time + 1), time + 1
        warp.at += 1
        if warp.at == len(self.body):
            warp.at, warp.rounds = 0, warp.rounds + 1

    def _arrive(self, warp: _Warp, time: float) -> None:
        warp.waiting = True
        mates = [one for one in self.warps if one.program == warp.program]
        if all(one.waiting for one in mates):
            for one in mates:
                one.waiting, one.next = False, time + BARRIER


def _pipe(one: Instruction) -> str:
    """Integer multiplication shares the pipe of the others."""
    return "fma" if one.pipe == "imad" else one.pipe


def cycles(body: list[Instruction], *, warps: int, programs: int, architecture: int, rounds: int = 10) -> float:
    """Cycles of a multiprocessor for one iteration of one program, where `programs` share it.

    Args:
        body: the main loop.
        warps: of a program.
        programs: that are resident together.
        architecture: 80 or 90.
        rounds: iterations; the first three are not counted.
    """
    found = []
    for share in BEGINNINGS if programs > 1 else BEGINNINGS[:1]:
        quarter = _Quarter(body, programs, warps, architecture)
        for warp in quarter.warps:
            warp.next = share * warp.program * len(body) * quarter.each
        found.append(_steady(quarter, rounds) / programs)
    return sum(found) / len(found)


def _steady(quarter: _Quarter, rounds: int) -> float:
    """Cycles of a round of the first warp."""
    first, ends, turn = quarter.warps[0], [], 0
    while first.rounds < rounds:
        able = [w for w in quarter.warps if not w.waiting]
        order = [quarter.warps[(turn + i) % len(quarter.warps)] for i in range(len(quarter.warps))]
        chosen, time = None, 0.0
        for warp in order:
            if warp in able:
                start = quarter.start(warp)
                if chosen is None or start < time:
                    chosen, time = warp, start
        if chosen is None:
            raise RuntimeError("every warp waits at a barrier")
        before = first.rounds
        quarter.issue(chosen, time)
        turn = quarter.warps.index(chosen)
        if chosen.at == 0 or quarter.body[chosen.at - 1].pipe == "barrier":
            turn = (turn + 1) % len(quarter.warps)
        if first.rounds > before:
            ends.append(time)
    return (ends[-1] - ends[2]) / (len(ends) - 3)
