"""What a run should be told before it begins: settings that do nothing where they are, and settings that rarely help.

One table of conditions and lines; a line is a warning in the log, never a refusal.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from rcmstr_fast.config import ModelConfig, OptimConfig, PretrainConfig, TrainConfig, is_vit, num_frames, resolve
from rcmstr_fast.train.plan import Plan


@dataclass(frozen=True)
class Setting:
    """What the conditions look at.

    Attributes:
        config: resolved.
        plan: lengths of the run.
        images: images of the data, without repeats.
        processes: of the run.
    """

    config: PretrainConfig
    plan: Plan
    images: int
    processes: int


def warnings(setting: Setting) -> list[str]:
    """The lines of this run, most important first."""
    return [*_unwise(setting), *_inactive(setting)]


def _unwise(setting: Setting) -> list[str]:
    """Settings that work, but seldom as meant."""
    config, plan = setting.config, setting.plan
    batch, left_out = plan.global_batch, plan.epoch_size % plan.global_batch
    found = [
        (
            plan.warmup_steps >= plan.total_steps,
            f"optim.warmup_steps={plan.warmup_steps} takes the whole run of {plan.total_steps} steps: the learning rate "
            "only rises",
        ),
        (
            setting.images < batch <= plan.epoch_size,
            f"train.global_batch_size={batch} is more than the {setting.images} images of the data: a step shows the same "
            "image more than once, as its own negative",
        ),
        (
            10 * left_out > plan.epoch_size,
            f"each epoch leaves out {left_out} of its {plan.epoch_size} images (others each time): they do not fill a "
            f"batch of {batch}",
        ),
    ]
    return [line for holds, line in found if holds] + _queues(config, batch)


def _queues(config: PretrainConfig, batch: int) -> list[str]:
    """Queues that hold little more than the last step."""
    size = getattr(config.method, "queue_size", None)
    if size is None:
        return []
    rows = {
        "frame": batch * (getattr(config.method, "enqueue_per_image", 0) or num_frames(config.model)),
        "subword": batch * getattr(config.method, "num_subwords", 1),
        "word": batch,
    }
    level = max(getattr(config.method, "levels", None) or ["word"], key=rows.__getitem__)
    found = [
        (
            2 * rows[level] > size,
            f"method.queue_size={size} is refilled in {size / rows[level]:.1f} steps at the {level} level ({rows[level]} keys "
            "a step): its negatives are those of the last step",
        ),
        (10 * batch > size, f"train.global_batch_size={batch} is more than a tenth of method.queue_size={size}"),
    ]
    return [line for holds, line in found if holds]


def _inactive(setting: Setting) -> list[str]:
    """Fields that differ from their defaults and do nothing here."""
    config, plan, method = setting.config, setting.plan, setting.config.method
    model, optim = config.model, config.optim
    changed = _changed(config, _plain(config))
    cnn, group = not is_vit(model), method.bn_group_size
    table: list[tuple[bool, str, str]] = [
        (group == 0 or group >= plan.micro_batch, "method.bn_shuffle",
         f"method.bn_group_size={group} makes one group of the {plan.micro_batch} images of a pass"),
        (getattr(method, "permute", None) is False,
         "method.num_patches method.group_size method.division method.shared_permutation", "method.permute=false"),
        (getattr(method, "inter", "") == "none",
         "method.inter_loss method.inter_weight method.inter_pairing method.inter_after_enqueue", "method.inter=none"),
        (not cnn, "method.mask_unit method.mask_rule", "a ViT masks its tokens"),
        (getattr(method, "kl", True) is False, "method.alpha method.tau_kl method.kl_reduction", "method.kl=false"),
        ("frame" not in (getattr(method, "levels", None) or ["frame"]),
         "method.enqueue_per_image method.round_frame_queue", "method.levels has no frame"),
        (getattr(method, "local_crops", 1) == 0, "method.local_area", "method.local_crops=0"),
        (getattr(method, "tau_rise", 1) == 0, "method.tau_patch_start", "method.tau_rise=0"),
        (getattr(method, "language", True) is False, "method.language_layers method.language_weight", "method.language=false"),
        (getattr(method, "adversarial_weight", 1) == 0, "method.discriminator_width method.discriminator_rate",
         "method.adversarial_weight=0"),
        (cnn, "model.depth", f"{model.encoder} has a depth of its own"),
        (not cnn, "model.width", f"{model.encoder} has a width of its own"),
        (model.tps == "none", "model.tps_checkpoint model.tps_align_corners", "model.tps=none"),
        (model.sequence == "none", "model.sequence_units", "model.sequence=none"),
        (optim.name != "sgd", "optim.sgd_momentum", f"optim.name={optim.name}"),
        (optim.name != "adamw", "optim.beta1 optim.beta2", f"optim.name={optim.name}"),
        (optim.name != "adadelta", "optim.rho", f"optim.name={optim.name}"),
        (optim.schedule != "cosine", "optim.min_lr", f"optim.schedule={optim.schedule}"),
        (config.train.steps > 0, "train.epochs", "train.steps decides"),
        (not config.train.probe_every, "train.probe_data train.probe_words train.probe_charset", "train.probe_every=0"),
        (setting.processes == 1, "train.timeout_minutes method.queue", "there is one process"),
    ]  # fmt: skip
    lines = []
    for holds, names, why in table:
        idle = [name for name in names.split() if name in changed]
        if holds and idle:
            lines.append(f"{', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing here: {why}")
    return lines


def _plain(config: PretrainConfig) -> PretrainConfig:
    """The resolved defaults of such a method, network and preset."""
    return resolve(
        PretrainConfig(
            preset=config.preset,
            model=ModelConfig(encoder=config.model.encoder),
            method=type(config.method)(),
            optim=OptimConfig(name=config.optim.name),
            train=TrainConfig(global_batch_size=config.train.global_batch_size),
        )
    )


def _changed(config: Any, default: Any, prefix: str = "") -> set[str]:
    """Names of the fields that differ from a configuration of defaults."""
    found = set()
    for field in fields(config):
        mine, theirs = getattr(config, field.name), getattr(default, field.name)
        if is_dataclass(mine):
            found |= _changed(mine, theirs, f"{prefix}{field.name}.")
        elif mine != theirs:
            found.add(prefix + field.name)
    return found
