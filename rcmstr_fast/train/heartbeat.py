"""Signs of life between the processes of a run: which one is silent when the others have waited too long.

A thread of each process tells the store of the run, once a second, that it is alive and how many exchanges the process
has begun. A frozen process stops telling; one that is stuck elsewhere (a dead disk) goes on telling, but stays behind.
"""

import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

#: Seconds to wait for the store itself.
_PATIENCE = 5.0


class Heartbeat:
    """Tells and reads the signs of life.

    Args:
        rank: of this process.
        world_size: processes.
        start: name of this start of them, so that signs of an earlier one are not read.
        interval: seconds between signs.
    """

    def __init__(self, rank: int, world_size: int, start: str, interval: float = 1.0) -> None:
        self.rank, self.world_size, self.start, self.interval = rank, world_size, start, interval
        self.exchanges = 0
        self._place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = self._connect()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="heartbeat", daemon=True)
        self._thread.start()

    def _connect(self) -> dist.TCPStore:
        address, port = self._place
        return dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_PATIENCE)
        )

    def _key(self, rank: int) -> str:
        return f"rcmstr_fast/{self.start}/alive/{rank}"

    def _tell(self) -> None:
        who, number = f"{os.getpid()} {socket.gethostname()}", 0
        while True:
            number += 1
            try:
                self._store.set(self._key(self.rank), f"{number} {self.exchanges} {who}")
            except RuntimeError:  # the store has gone with its process; what waits for that one says so
                return
            if self._ended.wait(self.interval):
                return

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=_PATIENCE)

    def silent(self) -> str:
        """Who keeps the others waiting, in words; takes some seconds."""
        try:
            store = self._connect()  # of its own: the thread may be waiting in the other one
            before = self._signs(store)
        except RuntimeError:
            before = {}
        if self.rank not in before:
            keeper = "its launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            return f"{keeper} does not answer at {self._place[0]}:{self._place[1]}"
        time.sleep(3 * self.interval)
        try:
            after = self._signs(store)
            end = time.monotonic() + _PATIENCE
            while after[self.rank][0] < before[self.rank][0] + 3 and time.monotonic() < end:  # a busy machine
                time.sleep(self.interval)
                after = self._signs(store)
        except RuntimeError:
            after = before
        if after.get(self.rank) == before[self.rank]:
            after = before  # the store went away meanwhile
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(_PATIENCE / 2)  # the store goes with this process; the others are still reading
        return _judge(before, after, self.rank, self.world_size)

    def _signs(self, store: dist.TCPStore) -> dict[int, tuple[int, int, str]]:
        """rank -> (number of the sign, exchanges begun, who) of those that have ever told."""
        found = {}
        for rank in [self.rank, *(r for r in range(self.world_size) if r != self.rank)]:
            try:
                store.wait([self._key(rank)], timedelta(seconds=_PATIENCE))
                number, exchanges, pid, host = store.get(self._key(rank)).decode().split(" ", 3)
                found[rank] = int(number), int(exchanges), f"process {pid} on {host}"
            except RuntimeError:
                if rank == self.rank:
                    raise
        return found


def _judge(
    before: dict[int, tuple[int, int, str]], after: dict[int, tuple[int, int, str]], own: int, world_size: int
) -> str:
    """Who is silent, from two looks at the signs of life."""
    missing = [f"rank {r}" for r in range(world_size) if r not in after]
    frozen = [r for r in after if r != own and before is not after and after[r][0] == before.get(r, (-1,))[0]]
    most = max(exchanges for _, exchanges, _ in after.values())
    behind = [r for r in after if after[r][1] < most]
    if missing or frozen:
        names = missing + [f"rank {r} ({after[r][2]})" for r in frozen]
        return f"{', '.join(names)} gives no sign of life: frozen, or its machine is"
    if behind:
        names = [f"rank {r} ({after[r][2]})" for r in behind]
        return f"{', '.join(names)} is alive, but has not come to exchange {most}: it waits for something else"
    return "every process is alive and waits, so it is the network between them"
