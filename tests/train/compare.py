"""Equality of two runs: metrics without the clock, and every tensor of their last checkpoints."""

import json
from pathlib import Path

import torch

from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.log import WALL_CLOCK
from rcmstr_fast.train.runfolder import RunFolder


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def tensors(tree, name="") -> dict[str, torch.Tensor]:
    """Every tensor and number in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in tensors(value, f"{name}.{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in tensors(value, f"{name}[{i}]").items()}
    if isinstance(tree, (torch.Tensor, int, float)):
        return {name: torch.as_tensor(tree)}
    return {}


def last(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(RunFolder(run).last)
    return tensors({k: v for k, v in state.items() if k != "config"})


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    assert metrics(one) == metrics(other)
    a, b = last(one), last(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
