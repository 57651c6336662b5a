"""Pretraining: a run from its configuration to its last step."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import Signals

from rcmstr_fast.config import PretrainConfig, RunError, resolve
from rcmstr_fast.methods.protocol import PretrainMethod
from rcmstr_fast.methods.registry import build_method
from rcmstr_fast.train.advice import Setting, warnings
from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.environment import session
from rcmstr_fast.train.identity import same_everywhere
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.online_probe import OnlineProbe, open_probe_words
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.start import check_start, start_from
from rcmstr_fast.train.stream import Stream
from rcmstr_fast.train.switches import decide
from rcmstr_fast.train.trackers import check_trackers
from rcmstr_fast.train.trainer import OneStep, Trainer, numerics
from rcmstr_fast.train.trial import Feed, Trial
from rcmstr_fast.train.tuned import adopted
from rcmstr_fast.train.utilisation import images_per_s_at_peak

_log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    build: Callable[[PretrainConfig, World], PretrainMethod] = build_method,
    open_stream: Callable[[PretrainConfig], Stream] = Stream,
) -> Path:
    """Pretrain in a run folder; an existing run with the same configuration is continued exactly.

    Args:
        config: null fields are filled in.
        build: makes the method.
        open_stream: opens the data.
    Returns:
        The run folder.
    Raises:
        ConfigError: the configuration, the data or the folder do not fit.
        RunError: the run could not go on, or a signal ended it (status 128 + signal); its state is saved.
    """
    resolve(config)
    check_trackers(config.train.trackers)
    check_start(config)
    folder = RunFolder(config.run)
    stopped = 0
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        world = stack.enter_context(joined(config.train.device, config.train.timeout_minutes))
        decide(config.train, world)  # a switch that cannot be is refused before anything is written
        config = world.on_rank0(lambda: folder.adopt(config))
        stream, probe_words = open_stream(config), open_probe_words(config)
        plan = make_plan(config, stream.epoch_size, world.world_size)
        world.on_rank0(lambda: stack.enter_context(folder.locked()))
        log = stack.enter_context(contextlib.closing(RunLog(folder, world)))
        stack.enter_context(numerics(config))
        held = world.on_rank0(folder.computed_with)
        trial = partial(trial_of, config, plan, world, folder, build, stream)
        found = stack.enter_context(adopted(config, plan, world, held, trial))
        trainer = Trainer(config, plan, world, folder, start_from(build(config, world), config), stream)
        trainer.images_per_s_at_peak = images_per_s_at_peak(config, world.device, trainer.bf16)
        if probe_words is not None and world.rank == 0:
            trainer.probe = OnlineProbe(probe_words, trainer.method, config.seed, world.device)
        trainer.step = trainer.state.restore(same_everywhere(stream.fingerprint, world))
        # What can be refused has been: only now is anything written.
        world.on_rank0(lambda: folder.write_description(config, session(world.world_size, found.kept())))
        log.open()
        for line in warnings(Setting(config, plan, stream.images, world.world_size)):
            _log.warning("%s", line)
        if trainer.step < plan.total_steps:
            stopped = trainer.run(log, signals)
        else:
            trainer.guard.check(last=True)
            _log.info("%s is finished at step %d; raise train.steps or train.epochs to go on", config.run, trainer.step)
    if stopped:  # only now: the processes have left the run together
        name = Signals(stopped).name
        raise RunError(f"stopped by {name}, saved at step {trainer.step}; the same command continues", 128 + stopped)
    return folder.path


def trial_of(
    config: PretrainConfig,
    plan: Plan,
    world: World,
    folder: RunFolder,
    build: Callable[[PretrainConfig, World], PretrainMethod],
    stream: Stream,
) -> Trial:
    """What the candidates of choices are timed on: trainers that are forgotten, in this process alone."""
    alone = World(world.device)

    def stepper() -> OneStep:
        return OneStep(Trainer(config, plan, alone, folder, build(config, alone), stream))

    return Trial(
        Feed(
            config,
            world.device,
            stepper,
            lambda step: step.trainer.method,
            lambda: stream.batches(0, plan, alone),
            world.world_size,
        )
    )
