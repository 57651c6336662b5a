"""How long a run is and how its batches are cut; known once the data are open."""

from dataclasses import dataclass

from rcmstr_fast.config import ConfigError, PretrainConfig


@dataclass(frozen=True)
class Plan:
    """Lengths of a run, in steps and images.

    Attributes:
        epoch_size: images an epoch.
        steps_per_epoch: whole batches an epoch; the rest of each shuffled epoch is left out.
        total_steps: steps of the run.
        warmup_steps: steps of linear warm-up.
        global_batch: images a step.
        local_batch: images a step of one process.
        micro_batch: images of one forward pass.
        save_every: steps between checkpoints.
    """

    epoch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    global_batch: int
    local_batch: int
    micro_batch: int
    save_every: int

    def epoch(self, step: int) -> int:
        """Epoch of the 0-based step."""
        return step // self.steps_per_epoch


def make_plan(config: PretrainConfig, epoch_size: int, world_size: int) -> Plan:
    """Lengths of a run; fills in `optim.warmup_steps`.

    Args:
        config: resolved.
        epoch_size: images an epoch.
        world_size: processes.
    Raises:
        ConfigError: the batch does not fit the data, the processes or batch norm.
    """
    train = config.train
    batch = int(train.global_batch_size or 0)
    if epoch_size < batch:
        raise ConfigError(f"train.global_batch_size must be at most the {epoch_size} images of an epoch, got {batch}")
    parts = world_size * train.accumulate
    if batch % parts:
        raise ConfigError(
            f"train.global_batch_size must be a multiple of processes * train.accumulate = "
            f"{world_size} * {train.accumulate}, got {batch}"
        )
    if batch // parts < 2:
        raise ConfigError(
            f"train.global_batch_size must give each forward pass 2 or more images (batch norm), got {batch} "
            f"over {world_size} processes and {train.accumulate} accumulation steps"
        )
    per_epoch = epoch_size // batch
    total = train.steps or int(train.epochs or 0) * per_epoch
    if total < 1:
        raise ConfigError(f"train.steps or train.epochs must be positive, got {train.steps} and {train.epochs}")
    if config.optim.warmup_steps is None:
        config.optim.warmup_steps = min(5000, total // 10)
    return Plan(
        epoch_size,
        per_epoch,
        total,
        config.optim.warmup_steps,
        batch,
        batch // world_size,
        batch // parts,
        train.save_every or per_epoch,
    )
