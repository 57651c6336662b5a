"""Where the processes of a run meet: a part of their store that no earlier start of them has written to.

torchrun keeps one store over its restarts (torch 2.13: "shared" with its own rendezvous). What a dead process has left in
it, its address, is then read by one that was started again sooner than its peers; it cannot connect, and each such
failure costs one more restart. The number of restarts does not tell the starts apart: machines count their own.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

#: Seconds between looks into the store.
_PAUSE = 0.02


def meet(rank: int, world_size: int, patience: timedelta) -> tuple[dist.Store, str]:
    """A store in which all processes of this start, and only they, write, and the name of the start.

    Rank 0 names the start and tells whom it has met. Another process believes a name only where it is met itself, by
    a number of its own: so rank 0 said it after this process had begun.

    Args:
        rank: of this process.
        world_size: processes; the environment says where their store is, as torchrun does.
        patience: how long to wait for the others.
    Raises:
        RuntimeError: the store or a process cannot be met.
    """
    store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=patience)))
    place, mine = dist.PrefixStore("rcmstr_fast", store), uuid.uuid4().hex
    end = time.monotonic() + patience.total_seconds()
    place.set(f"here/{rank}", mine)
    while True:
        name = _named(place, mine, world_size) if rank == 0 else _told(place, mine, rank)
        if name:
            return dist.PrefixStore(name, place), name
        if time.monotonic() > end:
            raise RuntimeError(f"no answer within {patience.total_seconds() / 60:g} minutes")
        time.sleep(_PAUSE)


def _named(place: dist.Store, mine: str, world_size: int) -> str:
    """Tell who is here; the name of the start once every process has answered to it."""
    others = range(1, world_size)
    if place.check([f"{mine}/{rank}" for rank in others]):
        return mine
    here = [place.get(f"here/{rank}").decode() for rank in others if place.check([f"here/{rank}"])]
    place.set("start", " ".join([mine, *here]))
    return ""


def _told(place: dist.Store, mine: str, rank: int) -> str:
    """The name of the start, where rank 0 has met this process."""
    name, *met = place.get("start").decode().split() if place.check(["start"]) else [""]
    if mine not in met:
        return ""
    place.set(f"{name}/{rank}", "")
    return name
