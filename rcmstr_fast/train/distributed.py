"""The processes of a run: torchrun's environment and the collectives. Gradients: `rcmstr_fast.train.gradients`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rcmstr_fast.config import ConfigError, RunError

T = TypeVar("T")

# Its name in torch 2.13; the former one warns there and is the only one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        with peers():
            _all_gather(gathered, tensor.contiguous())
        return gathered

    def gather_with_grad(self, tensor: Tensor) -> Tensor:
        """`gather` with gradient: each rank's part receives the sum of all ranks' gradients for it."""
        return tensor if self.world_size == 1 else _Gathered.apply(tensor, self)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, without gradient."""
        if self.world_size == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        with peers():
            dist.all_reduce(total)
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
        total = gradient.contiguous().clone()
        with peers():
            dist.all_reduce(total)
        return total.chunk(ctx.world.world_size)[ctx.world.rank], None


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started (or run alone) and leave them at the end.

    Args:
        device: auto, cpu or cuda.
    Raises:
        ConfigError: cuda without a GPU, or an incomplete torchrun environment.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    size = int(os.environ["WORLD_SIZE"]) if len(given) == len(names) else 1
    if "RANK" in given and len(given) < len(names):
        raise ConfigError(f"torchrun sets {', '.join(names)}; the environment has only {', '.join(given)}")
    place = choose_device(device, int(os.environ["LOCAL_RANK"]) if size > 1 else 0)
    if size == 1:
        yield World(place)
        return
    backend = "nccl" if place.type == "cuda" else "gloo"
    with peers():
        dist.init_process_group(backend)
        gradients = dist.new_group(backend=backend)
    yield World(place, int(os.environ["RANK"]), size, gradients)
    with peers():  # not after an error: the others may be gone
        dist.barrier()
        dist.destroy_process_group()


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
def peers() -> Iterator[None]:
    """Turn the failure of a collective into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"another process of the run is gone, its own message says why ({reason})") from error
