"""The configuration of `rcmstr probe` and `rcmstr finetune`."""

from dataclasses import dataclass, field
from typing import Literal

from rcmstr_fast.config import ConfigError, ModelConfig, as_list
from rcmstr_fast.fields import number


@dataclass
class ProbeConfig:
    """A decoder trained on labelled words, over a frozen, a fine-tuned or an untrained encoder.

    Attributes:
        run: the run folder; an interrupted run with the same configuration is continued, a finished one is shown.
        title: name of the model in tables; empty: the name of the run folder.
        seed: the one seed of subset, split, order, augmentation and initial weights.
        encoder: run folder of a pretraining, an encoder.safetensors, or `random` for an untrained encoder.
        like: run folder or encoder.safetensors whose network (not weights) encoder=random takes; empty: `model`.
        model: the network of encoder=random without `like`; not used otherwise.
        mode: what is trained: the decoder alone (frozen), all of it (finetune),
            or all of it from untrained weights (scratch).
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
        train: LMDB or image folders with the training words.
        val: folders with the validation words that choose the checkpoint; empty: split off the training words.
        val_fraction: share of the training words split off where `val` is empty; they serve validation alone.
        test: the test sets, each `name=folder` (or a folder, named by its last part).
        rotate: as data.rotate of the pretraining, for all words of this run and for the recogniser's later reading;
            encoder: as the encoder was pretrained.
        allow_overlap: go on although pictures of test or validation words are among the training words, by content;
            what overlaps is in the log either way.
        subset: share of the remaining training words that is used, in (0, 1]; a seeded choice, its list is saved.
        protocols: comparison protocols (docs/protocols.md); the first one also normalises the training labels
            and defines the validation accuracy.
        augment: augmentation of the training words.
        epochs: passes over the training words; used where steps is 0.
        steps: optimiser steps; 0: by `epochs`.
        batch_size: words a step (fewer where the training set is smaller).
        lr: highest learning rate of Adam under the one-cycle schedule.
        clip: gradient-norm limit; 0: off.
        eval_every: steps between validations and checkpoints; 0: twenty times in the run.
        log_every: steps between lines of metrics.jsonl.
        precision: fp32, bf16 (autocast) or auto (bf16 where the hardware multiplies it).
        device: auto, cpu or cuda.
        workers: decoding threads; 0: all CPUs of the process.
        decoder_threads: CPU threads of the training steps (a small decoder over kept frames is fastest on one);
            0: as many as everything else has.
        cache_gib: memory limit in GiB for decoded words, and again for the frames of a frozen encoder.
    """

    run: str = "runs/probe"
    title: str = ""
    seed: int = 0
    encoder: str = ""
    like: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    mode: Literal["frozen", "finetune", "scratch"] = "frozen"
    bn: Literal["running", "batch"] = "running"
    decoder: Literal["auto", "ctc", "ctc_linear", "attention", "attention_rclstr", "transformer"] = "auto"
    memory: Literal["auto", "tokens", "frames", "both"] = "auto"
    max_length: int = number(25, low=1)
    decoder_hidden: int = 256
    normalise: bool = False
    charset: str = "36"
    train: list[str] | str = field(default_factory=list)
    val: list[str] | str = field(default_factory=list)
    val_fraction: float = 0.1
    test: list[str] | str = field(default_factory=list)
    rotate: Literal["encoder", "never", "tall"] = "encoder"
    allow_overlap: bool = False
    subset: float = 1.0
    protocols: list[str] | str = field(default_factory=lambda: ["fewer_labels36"])
    augment: Literal["light", "none"] = "light"
    epochs: int = 10
    steps: int = 0
    batch_size: int = 256
    lr: float = 5e-4
    clip: float = 5.0
    eval_every: int = 0
    log_every: int = 10
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    decoder_threads: int = 0
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test", "protocols"):
            setattr(self, name, as_list(getattr(self, name)))


@dataclass
class FinetuneConfig(ProbeConfig):  # noqa: D101 (the fields and their meaning are the same, the default of mode is not)
    __doc__ = ProbeConfig.__doc__
    mode: Literal["frozen", "finetune", "scratch"] = "finetune"


#: Fields that may differ when a run is continued: they change where and how fast, not what, is computed.
FREE_FIELDS = ("run", "title", "device", "workers", "decoder_threads", "cache_gib", "log_every")


def check(config: ProbeConfig) -> None:
    """Check what needs no data.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    scratch = config.mode == "scratch"
    rules = [
        (config.encoder or scratch, "encoder must name a run folder, an encoder.safetensors, or be `random`",
         config.encoder),
        (not scratch or config.encoder in ("", "random"),
         "mode=scratch trains an untrained encoder: encoder must be `random` (like=... takes the network of a run)",
         config.encoder),
        (not config.like or scratch or config.encoder == "random", "like goes with encoder=random only", config.like),
        (config.bn == "running" or config.mode == "frozen", "bn=batch goes with mode=frozen only", config.mode),
        (bool(config.train), "train must name at least one folder", config.train),
        (bool(config.test), "test must name at least one set, name=folder", config.test),
        (bool(config.protocols), "protocols must name at least one protocol", config.protocols),
        (config.val or 0 < config.val_fraction < 1, "val_fraction must be in (0, 1) where val is empty",
         config.val_fraction),
        (0 < config.subset <= 1, "subset must be in (0, 1]", config.subset),
        (config.steps > 0 or config.epochs > 0, "epochs or steps must be positive", (config.epochs, config.steps)),
        (config.steps >= 0, "steps must be 0 or more", config.steps),
        (config.decoder_hidden >= 1, "decoder_hidden must be 1 or more", config.decoder_hidden),
        (config.batch_size >= 1, "batch_size must be 1 or more", config.batch_size),
        (config.lr > 0, "lr must be positive", config.lr),
        (config.clip >= 0, "clip must be 0 or more", config.clip),
        (config.eval_every >= 0, "eval_every must be 0 or more", config.eval_every),
        (config.log_every >= 1, "log_every must be 1 or more", config.log_every),
        (config.workers >= 0, "workers must be 0 or more", config.workers),
        (config.decoder_threads >= 0, "decoder_threads must be 0 or more", config.decoder_threads),
        (config.cache_gib >= 0, "cache_gib must be 0 or more", config.cache_gib),
    ]  # fmt: skip
    for holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"{expected}, got {got!r}")
