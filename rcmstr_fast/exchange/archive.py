"""Files of weights that others wrote or will read: no code is executed from them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rcmstr_fast.config import ConfigError
from rcmstr_fast.train.checkpoint import write_whole

_TORCH = (".pth", ".pt", ".tar", ".ckpt", ".bin")
#: Entries under which projects keep the state dict of a checkpoint.
_HOLDERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "net", "encoder")
_NEITHER = "expected a safetensors file or a torch checkpoint, it is neither, or cut off"
#: What torch says of checkpoints whose objects it does not make.
_OBJECTS = re.compile("Unsupported (global|class)", re.I)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint (`weights_only`), on the CPU.

    Args:
        path: the file; of a checkpoint the state dict may lie under `state_dict`, `model` and the like.
    Returns:
        Name -> tensor.
    Raises:
        ConfigError: one line: missing, not such a file, or it holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"expected a file of weights, got {path}, which does not exist")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _OBJECTS.search(str(error)):
            raise ConfigError(f"{path}: {_NEITHER}") from error
        raise ConfigError(
            f"{path}: holds Python objects beside tensors, which are not loaded since they could run code; "
            "save its state dict alone in its own project and import that"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {_NEITHER}") from error
    found = _state_dict(held)
    if not found:
        raise ConfigError(f"{path}: expected a state dict of tensors, found none in it")
    return found


def _state_dict(held: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: at its top, or under one of the usual entries."""
    if not isinstance(held, Mapping):
        return {}
    for name in _HOLDERS:
        if isinstance(held.get(name), Mapping) and (inner := _state_dict(held[name])):
            return inner
    return {str(name): x.detach() for name, x in held.items() if isinstance(x, Tensor)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], holder: str = "") -> None:
    """Write a state dict: safetensors or torch by the suffix of `path`.

    Args:
        path: `.safetensors`, or `.pth` and the like.
        tensors: name -> tensor.
        holder: a torch file keeps the state dict under this entry; empty: at its top.
    Raises:
        ConfigError: another suffix.
        RunError: the disk is full or cannot be written.
    """
    check_suffix(path)
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    if path.suffix == ".safetensors":
        data = save(plain, {"format": "pt"})
        write_whole(path, lambda file: file.write(data))
    else:
        content = {holder: plain} if holder else plain
        write_whole(path, lambda file: torch.save(content, file))


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless `write_tensors` takes the suffix."""
    if path.suffix not in (".safetensors", *_TORCH):
        raise ConfigError(f"out must end in .safetensors or .pth, got {path.name}")
