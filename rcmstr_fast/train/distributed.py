"""The processes of a run: torchrun's environment, the collectives, gradients averaged after backward.

Gradients are averaged by one reduction of all of them after the last micro-batch instead of by
DistributedDataParallel: the method's forward stays free to call collectives, to be called several times a
step and to use only part of its parameters.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rcmstr_fast.config import ConfigError, RunError

T = TypeVar("T")


@dataclass
class World:
    """This process among those of the run; also the `Collectives` of the method.

    Attributes:
        device: where this process computes.
        rank: number of this process.
        world_size: number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first axis, in rank order, without gradient."""
        tensor = tensor.detach()
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _peers():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, without gradient."""
        if self.world_size == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        with _peers():
            dist.all_reduce(total)
        return total / self.world_size

    def average_gradients(self, parameters: list[Tensor], beside: Tensor) -> Tensor:
        """Average the gradients over ranks in place.

        Args:
            parameters: those with a gradient, the same on every rank.
            beside: [n] float32; more values to average in the same reduction.
        Returns:
            The mean of `beside`.
        """
        if self.world_size == 1:
            return beside
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.mean(torch.cat([*(g.flatten() for g in gradients), beside]))
        *means, beside = flat.split([*(g.numel() for g in gradients), beside.numel()])
        torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])
        return beside

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace each float tensor by its mean over ranks."""
        if self.world_size > 1 and tensors:
            means = self.mean(torch.cat([x.flatten() for x in tensors])).split([x.numel() for x in tensors])
            torch._foreach_copy_(tensors, [m.view_as(x) for m, x in zip(means, tensors, strict=True)])

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
        with _peers():
            dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]


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
    with _peers():
        dist.init_process_group(backend)
    yield World(place, int(os.environ["RANK"]), size)
    with _peers():  # not after an error: the others may be gone
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
def _peers() -> Iterator[None]:
    """Turn the failure of a collective into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"another process of the run is gone, its own message says why ({reason})") from error
