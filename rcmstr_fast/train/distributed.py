"""The processes of a run: torchrun's environment and the collectives. Gradients: `rcmstr_fast.train.gradients`."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.train.heartbeat import Heartbeat
from rcmstr_fast.train.meeting import meet

T = TypeVar("T")

# Its name in torch 2.13; the former one warns there and is the only one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Signs of life of the joined processes and the minutes they wait for each other; empty alone.
_alive: list[tuple[Heartbeat, float]] = []

Exchange = Callable[[], object]
#: Who takes the exchanges of a step that is being recorded; empty while none is.
_recorders: list[Callable[[Exchange], None]] = []


@dataclass
class World:
    """This process among those of the run; also the `Collectives` of the method.

    Attributes:
        device: where this process computes.
        rank: number of this process.
        world_size: number of processes.
        gradient_group: a process group for the gradients alone, so that reductions that overlap with backward cannot
            interleave with the method's collectives; None: the default group.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    gradient_group: dist.ProcessGroup | None = None

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first axis, in rank order, without gradient."""
        tensor = tensor.detach()
        if self.world_size == 1:
            return tensor
        gathered = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        mine = tensor.contiguous()
        exchange(lambda: _all_gather(gathered, mine))
        return gathered

    def gather_with_grad(self, tensor: Tensor) -> Tensor:
        """`gather` with gradient: each rank's part receives the sum of all ranks' gradients for it."""
        return tensor if self.world_size == 1 else _Gathered.apply(tensor, self)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, without gradient."""
        if self.world_size == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        exchange(lambda: dist.all_reduce(total))
        return total / self.world_size

    def on_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; every rank gets its (picklable) result or its ConfigError or RunError."""
        if self.world_size == 1:
            return action()
        box: list = [None, None]
        if self.rank == 0:
            try:
                box[0] = action()
            except (ConfigError, RunError) as error:
                box[1] = error
        with peers():
            dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]


class _Gathered(torch.autograd.Function):
    """All-gather whose backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        """[n, ..] to [W n, ..]."""
        ctx.world = world
        return world.gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """[W n, ..] to [n, ..]."""
        if recording():
            raise RunError(
                "train.cuda_graph=on: the gradients of this method pass between processes inside backward, where a "
                "recording cannot be parted; use auto or off"
            )
        total = gradient.contiguous().clone()
        with peers():
            dist.all_reduce(total)
        return total.chunk(ctx.world.world_size)[ctx.world.rank], None


@contextmanager
def joined(device: str, timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the processes that torchrun started (or run alone) and leave them at the end.

    Args:
        device: auto, cpu or cuda.
        timeout_minutes: how long one process waits for the others.
    Raises:
        ConfigError: cuda without a GPU, or an incomplete or wrong torchrun environment.
        RunError: the other processes cannot be met.
    """
    rank, size, local_rank = _numbers_of_process()
    place = choose_device(device, local_rank)
    if size == 1:
        yield World(place)
        return
    backend = "nccl" if place.type == "cuda" else "gloo"
    patience = timedelta(minutes=timeout_minutes)
    try:
        store, start = meet(rank, size, patience)
        dist.init_process_group(backend, timeout=patience, rank=rank, world_size=size, store=store)
        gradients = dist.new_group(backend=backend, timeout=patience)
        heart = Heartbeat(rank, size, start, interval=min(1.0, 6 * timeout_minutes))
    except RuntimeError as error:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"rank {rank} cannot meet the other processes at {meeting} ({_first_line(error)})") from error
    _alive.append((heart, timeout_minutes))
    try:
        yield World(place, rank, size, gradients)
        with peers():  # not after an error: the others may be gone
            dist.barrier()
            dist.destroy_process_group()
    finally:
        _alive.pop()
        heart.close()


def _numbers_of_process() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun's environment has them; (0, 1, 0) alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    if "RANK" in given and len(given) < len(names):
        raise ConfigError(f"torchrun sets {', '.join(names)}; the environment has only {', '.join(given)}")
    if len(given) < len(names):
        return 0, 1, 0
    size = _whole("WORLD_SIZE", 1, 2**20)
    rank, local_rank = _whole("RANK", 0, size - 1), _whole("LOCAL_RANK", 0, size - 1)
    if size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"{size} processes (WORLD_SIZE) need a place to meet; the environment lacks {' and '.join(missing)}"
            )
        _whole("MASTER_PORT", 1, 65535)
    return rank, size, local_rank if size > 1 else 0


def _whole(name: str, low: int, high: int) -> int:
    """A whole number of the environment."""
    text = os.environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ConfigError(f"the environment variable {name} must be a whole number in {low}..{high}, got {text!r}")
    return int(text)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a process; `auto` takes a GPU where there is one."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda needs a CUDA GPU and a CUDA build of torch; `rcmstr doctor` shows both")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"process {local_rank} of this machine needs its own GPU, the machine has {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; `auto` does where the hardware multiplies it (GPUs; AVX512-BF16 and AMX CPUs)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def recorded(take: Callable[[Exchange], None]) -> Iterator[None]:
    """While entered, a step is being recorded: every exchange is handed to `take` instead of being made."""
    _recorders.append(take)
    try:
        yield
    finally:
        _recorders.pop()


def recording() -> bool:
    """Whether a step is being recorded."""
    return bool(_recorders)


def exchange(run: Exchange) -> None:
    """Make an exchange with the other processes of a step; while the step is recorded, leave it to the recorder.

    Args:
        run: collectives that read and write tensors made before; a replayed step calls it again.
    """

    def once() -> None:
        with peers():
            run()

    if _recorders:
        _recorders[-1](once)
    else:
        once()


@contextmanager
def peers() -> Iterator[None]:
    """Turn the failure of a collective into one line: a lost process, or one that has been silent for too long."""
    if _alive:
        _alive[-1][0].exchanges += 1
    try:
        yield
    except RuntimeError as error:
        reason = _first_line(error)
        if _alive and ("timed out" in str(error).lower() or "timeout" in str(error).lower()):
            heart, minutes = _alive[-1]
            raise RunError(
                f"waited {minutes:g} minutes (train.timeout_minutes) for the other processes: {heart.silent()}"
            ) from error
        raise RunError(f"another process of the run is gone, its own message says why ({reason})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
