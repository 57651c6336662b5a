"""Pretraining methods: what a step computes."""

import torch

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.contrastive import ContrastiveMethod
from rcmstr_fast.methods.rcmstr import RCMSTR
from rcmstr_fast.methods.step import Collectives, Local, StepBatch, StepOutput

__all__ = ["RCMSTR", "Collectives", "ContrastiveMethod", "Local", "StepBatch", "StepOutput", "build_method"]


def build_method(config: PretrainConfig, collectives: Collectives | None = None) -> ContrastiveMethod:
    """Make the method of a resolved configuration, with weights that depend on `config.seed` alone.

    SeqMoCo and RCLSTR are the contrastive method with the switches that `resolve` set for them; RCMSTR
    adds masked image modelling.

    Args:
        config: from `rcmstr_fast.config.resolve`.
        collectives: exchange between processes; None: a single process.
    """
    made = RCMSTR if config.method.name == "rcmstr" else ContrastiveMethod
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return made(config, collectives or Local())
