"""encoder.safetensors: the part of a run that is shared, with everything needed to use it in its header."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, PretrainConfig, RunError
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.commit import commit

KIND = "rcmstr_fast encoder"


class Exporting(Protocol):
    """What has parts to export: a method, or parts that came from elsewhere."""

    def exported(self) -> dict[str, nn.Module]:
        """`encoder` and `rectifier`."""
        ...


def export_encoder(
    method: Exporting,
    path: Path,
    config: PretrainConfig,
    step: int,
    tensors: dict[str, Tensor] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write encoder and rectifier.

    Args:
        method: its `exported` parts are written.
        path: the file; replaced whole or not at all.
        config: resolved.
        step: steps trained.
        tensors: what to write, by the names `PART.*`; None: what they are now.
        facts: further entries of the header (JSON values).
    Raises:
        RunError: the disk is full or cannot be written, or a tensor is not finite.
    """
    parts = method.exported()
    if tensors is None:
        tensors = {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
    model = config.model
    vit = model.encoder.startswith("vit")
    header = {
        "kind": KIND,
        "arch": model.encoder,
        "width": model.width,
        "depth": model.depth,
        "height": model.height,
        "image_width": model.image_width,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "frames": model.image_width // 4 + (0 if vit else 1),
        "out_channels": parts["encoder"].out_channels,
        "rectifier": model.tps,
        "tps_align_corners": bool(model.tps_align_corners),
        "sequence": model.sequence,
        "class_token": model.class_token,
        "final_norm": model.final_norm,
        "commit": commit(),
        "step": step,
        "config": dataclasses.asdict(config),
    } | (facts or {})
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    for name, x in plain.items():
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise RunError(f"{path} is not written: tensor {name} is not finite")
    data = safetensors.torch.save(plain, {"rcmstr_fast": json.dumps(header)})
    write_whole(path, lambda file: file.write(data))


def refuse_nonfinite(tensors: dict[str, Tensor], where: str) -> None:
    """Name the first tensor of a file with values that are not finite, before a training run stumbles over them.

    Args:
        tensors: name -> tensor.
        where: begins the message: the file.
    Raises:
        ConfigError: with the tensor's name and how many of its values are NaN or infinite.
    """
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            wrong = int((~torch.isfinite(x)).sum())
            raise ConfigError(f"{where}: tensor {name} has {wrong} of {x.numel()} values that are NaN or infinite")


def read_export(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """What an exported file holds.

    Args:
        path: an `encoder.safetensors` or the run folder that holds one.
    Returns:
        the file, its header and its tensors by name.
    Raises:
        ConfigError: the file is missing, cut off, foreign, or a tensor has values that are not finite.
    """
    path = Path(path)
    file = path / "encoder.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: expected an encoder.safetensors or a run folder that holds one, there is none")
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("rcmstr_fast", "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file}: not an exported encoder, or one cut off ({error})") from error
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise ConfigError(f"{file}: expected an encoder exported by rcmstr_fast, it has no such header")
    refuse_nonfinite(tensors, str(file))
    return file, header, tensors
