"""The configuration of `rcmstr probe`, `rcmstr finetune` and `rcmstr segment`."""

from dataclasses import dataclass, field
from typing import Literal

from rcmstr_fast.config import ConfigError, ModelConfig, as_list
from rcmstr_fast.fields import check_fields, number

#: optimiser -> learning rate, schedule, weight decay: RCLSTR's, DiG's and SeqCLR's recipes.
_RECIPES: dict[str, tuple[float, str, float]] = {
    "adam": (5e-4, "one_cycle", 0.0),
    "adamw": (1e-4, "cosine", 0.05),
    "adadelta": (10.0, "step", 1e-4),
}


@dataclass
class TrainedConfig:
    """What is trained on top of an encoder, on what, and how: the fields that every evaluation has.

    Attributes:
        run: the run folder; an interrupted run with the same configuration is continued, a finished one is shown.
        title: name of the model in tables; empty: the name of the run folder.
        seed: the one seed of subset, split, order, augmentation and initial weights.
        encoder: run folder of a pretraining, an encoder.safetensors, or `random` for an untrained encoder.
        like: run folder or encoder.safetensors whose network (not weights) encoder=random takes; empty: `model`.
        model: the network of encoder=random without `like`; not used otherwise.
        mode: what is trained: the decoder or head alone (frozen), all of it (finetune),
            or all of it from untrained weights (scratch).
        train: LMDB or image folders with the training words.
        val: folders with the validation words that choose the checkpoint; empty: split off the training words.
        val_fraction: share of the training words split off where `val` is empty; they serve validation alone.
        test: the test sets, each `name=folder` (or a folder, named by its last part).
        rotate: as data.rotate of the pretraining, for all words of this run and for the recogniser's later reading;
            encoder: as the encoder was pretrained.
        allow_overlap: go on although pictures of test or validation words are among the training words, by content;
            what overlaps is in the log either way.
        subset: share of the remaining training words that is used, in (0, 1]; a seeded choice, its list is saved.
        augment: augmentation of the training words.
        epochs: passes over the training words; used where steps is 0.
        steps: optimiser steps; 0: by `epochs`.
        batch_size: words a step (fewer where the training set is smaller).
        accumulate: forward passes a step, one after the other: less memory, the same step.
        train_weights: relative share of each folder of `train` in an epoch (MJ and ST half and half: 1 1); empty: by
            their usable words.
        bn_group_size: words that share batch-norm statistics while the encoder trains; 0: those of a forward pass.
        optimizer: adam, adamw or adadelta (docs/protocols.md says whose recipe each is).
        lr: highest learning rate; null: 5e-4 (adam), 1e-4 (adamw), 10 (adadelta).
        schedule: one_cycle, cosine (linear warm-up, then down to min_lr), or step (a tenth from 60 %, a hundredth from
            80 % of the run on); null: one_cycle (adam), cosine (adamw), step (adadelta).
        warmup_steps: of cosine and step; null: a tenth of the run (cosine), 0 (step).
        min_lr: end of the cosine.
        weight_decay: null: 0 (adam), 0.05 (adamw), 1e-4 (adadelta).
        layer_decay: factor of the learning rate from each layer of the encoder to the one below; 1: all alike.
        clip: gradient-norm limit; 0: off.
        eval_every: steps between validations and checkpoints; 0: twenty times in the run.
        log_every: steps between lines of metrics.jsonl.
        precision: fp32, bf16 (autocast) or auto (bf16 where the hardware multiplies it); fp64 is for comparing runs, its
            files hold float32.
        device: auto, cpu or cuda.
        workers: decoding threads; 0: all CPUs of the process.
        decoder_threads: CPU threads of the training steps (a small decoder over kept frames is fastest on one);
            0: as many as everything else has.
        cache_gib: memory limit in GiB for decoded words, and again for the frames of a frozen encoder.
    """

    run: str = "runs/probe"
    title: str = ""
    seed: int = number(0, low=0)
    encoder: str = ""
    like: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    mode: Literal["frozen", "finetune", "scratch"] = "frozen"
    train: list[str] | str = field(default_factory=list)
    val: list[str] | str = field(default_factory=list)
    val_fraction: float = number(0.1, low=0, below=1)
    test: list[str] | str = field(default_factory=list)
    rotate: Literal["encoder", "never", "tall"] = "encoder"
    allow_overlap: bool = False
    subset: float = number(1.0, above=0, high=1)
    augment: Literal["light", "none"] = "light"
    epochs: int = number(10, low=0)
    steps: int = number(0, low=0)
    batch_size: int = number(256, low=1)
    accumulate: int = number(1, low=1)
    train_weights: list[float] = number([], above=0)
    bn_group_size: int = number(0, low=0)
    optimizer: Literal["adam", "adamw", "adadelta"] = "adam"
    lr: float | None = number(None, above=0)
    schedule: Literal["one_cycle", "cosine", "step"] | None = None
    warmup_steps: int | None = number(None, low=0)
    min_lr: float = number(0.0, low=0)
    weight_decay: float | None = number(None, low=0)
    layer_decay: float = number(1.0, above=0, high=1)
    clip: float = number(5.0, low=0)
    eval_every: int = number(0, low=0)
    log_every: int = number(10, low=1)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = number(0, low=0)
    decoder_threads: int = number(0, low=0)
    cache_gib: float = number(4.0, low=0)

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            setattr(self, name, as_list(getattr(self, name)))

    @property
    def resolved_lr(self) -> float:
        """`lr`, or that of the optimiser's recipe."""
        return self.lr if self.lr is not None else _RECIPES[self.optimizer][0]

    @property
    def resolved_schedule(self) -> str:
        """`schedule`, or that of the optimiser's recipe."""
        return self.schedule or _RECIPES[self.optimizer][1]

    @property
    def resolved_weight_decay(self) -> float:
        """`weight_decay`, or that of the optimiser's recipe."""
        return self.weight_decay if self.weight_decay is not None else _RECIPES[self.optimizer][2]


@dataclass
class ProbeConfig(TrainedConfig):
    """A decoder trained on labelled words, over a frozen, a fine-tuned or an untrained encoder.

    Attributes:
        bn: batch norm of a frozen encoder while the decoder trains: the running statistics, or the batch's,
            with the running statistics re-estimated (what the released RCLSTR code does).
        decoder: the decoder; auto: ctc for the CNN, transformer for the ViT (docs/protocols.md describes them).
        memory: what the decoder reads of the encoder: tokens (every patch of the ViT; the visual frames V of the CNN),
            frames (the encoder's sequence: a ViT's column means, a CNN's V or, with model.sequence=bilstm, H), or both
            side by side (SeqCLR's (H, V)); auto: tokens for the transformer, frames for the others.
        max_length: longest text in characters: longer labels are no training words, and a decoder that writes
            character by character stops there.
        decoder_hidden: LSTM units a direction of the CTC and attention decoders.
        normalise: bring each channel of the frames to mean 0 and deviation 1 (batch norm without weights) before the
            decoder, which then learns faster; no part of the published protocols.
        charset: 36, 62, 94 or a UTF-8 file (one character a line, or one long line).
        protocols: comparison protocols (docs/protocols.md); the first one also normalises the training labels
            and defines the validation accuracy.
    """

    bn: Literal["running", "batch"] = "running"
    decoder: Literal["auto", "ctc", "ctc_linear", "attention", "attention_rclstr", "transformer"] = "auto"
    memory: Literal["auto", "tokens", "frames", "both"] = "auto"
    max_length: int = number(25, low=1)
    decoder_hidden: int = number(256, low=1)
    normalise: bool = False
    charset: str = "36"
    protocols: list[str] | str = field(default_factory=lambda: ["fewer_labels36"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.protocols = as_list(self.protocols)


@dataclass
class FinetuneConfig(ProbeConfig):  # noqa: D101 (the fields and their meaning are the same, the default of mode is not)
    __doc__ = ProbeConfig.__doc__
    mode: Literal["frozen", "finetune", "scratch"] = "finetune"


@dataclass
class SegmentConfig(TrainedConfig):
    """A segmentation head trained on pictures with masks, over a frozen, a fine-tuned or an untrained encoder.

    Attributes:
        run: the run folder; an interrupted run with the same configuration is continued, a finished one is shown.
        train: folders with `pairs.tsv` (picture, tab, mask, tab, text; the text may be missing) beside `images/` and
            `masks/` (white = text): what `rcmstr data convert` makes of TextSeg.
        val: such folders for the validation that chooses the checkpoint; empty: split off the training pairs.
        test: the test sets, each `name=folder` (or a folder, named by its last part).
        augment: augmentation of the training pictures; what moves pixels moves those of the mask, too.
        batch_size: pictures a step (fewer where the training set is smaller).
        eval_every: steps between validations and checkpoints; 0: twenty times in the run.
        blocks: attention blocks of the head.
        heads: attention heads of each block.
        dim: channels of the blocks.
    """

    run: str = "runs/segment"
    batch_size: int = number(64, low=1)
    blocks: int = number(3, low=1)
    heads: int = number(2, low=1)
    dim: int = number(384, low=1)


def check_segment(config: SegmentConfig) -> None:
    """Check what needs no data.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    check_trained(config)
    refuse((config.dim % config.heads == 0, "dim must be a multiple of heads", (config.dim, config.heads)))


#: Fields that may differ when a run is continued: they change where, how fast and in what division, not what, is
#: computed.
FREE_FIELDS = (
    "run",
    "title",
    "device",
    "workers",
    "decoder_threads",
    "cache_gib",
    "log_every",
    "accumulate",
)


def check(config: ProbeConfig) -> None:
    """Check what needs no data.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    check_trained(config)
    refuse(
        (config.bn == "running" or config.mode == "frozen", "bn=batch goes with mode=frozen only", config.mode),
        (bool(config.protocols), "protocols must name at least one protocol", config.protocols),
    )


def check_trained(config: TrainedConfig) -> None:
    """`check` of the fields that every evaluation has."""
    check_fields(config)
    scratch = config.mode == "scratch"
    one_cycle = config.resolved_schedule == "one_cycle"
    refuse(
        (config.encoder or scratch, "encoder must name a run folder, an encoder.safetensors, or be `random`",
         config.encoder),
        (not scratch or config.encoder in ("", "random"),
         "mode=scratch trains an untrained encoder: encoder must be `random` (like=... takes the network of a run)",
         config.encoder),
        (not config.like or scratch or config.encoder == "random", "like goes with encoder=random only", config.like),
        (bool(config.train), "train must name at least one folder", config.train),
        (bool(config.test), "test must name at least one set, name=folder", config.test),
        (config.val or config.val_fraction > 0, "val_fraction must be more than 0 where val is empty",
         config.val_fraction),
        (config.steps > 0 or config.epochs > 0, "epochs or steps must be positive", (config.epochs, config.steps)),
        (not config.train_weights or len(config.train_weights) == len(config.train),
         "train_weights must be one number for each folder of train", config.train_weights),
        (config.layer_decay == 1 or config.mode != "frozen", "layer_decay goes with a trained encoder, not mode=frozen",
         config.layer_decay),
        (config.bn_group_size != 1, "bn_group_size must be 0 or at least 2: one word has no batch statistics",
         config.bn_group_size),
        (not one_cycle or config.warmup_steps is None, "warmup_steps goes with schedule=cosine or step",
         config.warmup_steps),
    )  # fmt: skip


def refuse(*rules: tuple[object, str, object]) -> None:
    """Raise ConfigError for the first rule (whether it holds, what was expected, what came) that does not hold."""
    for holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"{expected}, got {got!r}")
