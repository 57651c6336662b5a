"""The smallest configurations that the benchmarks of the step can run."""

import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.measure.running import inputs, made_up_batches
from rcmstr_fast.methods import StepBatch
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.plan import make_plan

CPU = torch.device("cpu")


def tiny(encoder: str = "resnet29", batch: int = 4, **method) -> PretrainConfig:
    config = PretrainConfig(preset="fast")
    config.model.encoder, config.model.width, config.model.depth = encoder, 0.25, 1
    config.model.projector_hidden, config.model.feature_dim = 32, 16
    config.method.queue_size = 96
    config.train.global_batch_size, config.train.precision, config.train.device = batch, "fp32", "cpu"
    for name, value in method.items():
        setattr(config.method, name, value)
    return resolve(config)


def tiny_batch(config: PretrainConfig):
    world = World(CPU)
    return inputs(made_up_batches(config, make_plan(config, 1 << 20, 1), world, 1)[0][0])


def step_batch(given) -> StepBatch:
    """What our method takes, of the inputs of a step."""
    return StepBatch(torch.stack([given.query, given.key]), given.index, given.epoch, given.permuted)
