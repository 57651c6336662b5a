"""The smallest configurations that the benchmarks of the step can run."""

import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.measure.running import inputs, made_up_batches
from rcmstr_fast.methods import Batch, settings
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.plan import make_plan

CPU = torch.device("cpu")


def tiny(encoder: str = "resnet29", batch: int = 4, **method) -> PretrainConfig:
    config = PretrainConfig(preset="fast")
    config.method = settings(method.pop("name", "rcmstr"), **{"queue_size": 96, **method})
    config.model.encoder, config.model.width, config.model.depth = encoder, 0.25, 1
    config.model.projector_hidden, config.model.feature_dim = 32, 16
    config.train.global_batch_size, config.train.precision, config.train.device = batch, "fp32", "cpu"
    return resolve(config)


def tiny_batch(config: PretrainConfig):
    world = World(CPU)
    return inputs(made_up_batches(config, make_plan(config, 1 << 20, 1), world, 1)[0][0])


def step_batch(given) -> Batch:
    """What our method takes, of the inputs of a step."""
    views = {"query": given.query, "key": given.key}
    if given.permuted is not None:
        views["permuted"] = given.permuted
    drawn = {} if given.order is None else {"order": given.order}
    return Batch(views, given.index, given.epoch, drawn)
