"""The configuration: plain dataclasses, one field a choice; stdlib only, imported by every layer.

The command line, the YAML recipes and `config.yaml` of a run folder all have exactly these fields.
Values that a preset or a method decides are None here and filled in by `resolve`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rcmstr_fast.fields import ConfigError, check_fields, number

Level = Literal["frame", "subword", "word"]
LEVELS: tuple[Level, ...] = ("frame", "subword", "word")


def as_list(value: list[str] | str) -> list[str]:
    """A single string stands for a list of one: `--data.roots PATH`."""
    return [value] if isinstance(value, str) else value


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a loss that is not finite, a lost process, a signal; shown as one line.

    Attributes:
        status: exit status of the command.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class DataConfig:
    """Where the unlabelled word images are and how they are read.

    Attributes:
        roots: one or a list of: LMDB folder, folder that holds LMDBs, or folder of images; searched recursively.
        weights: relative share of each root in an epoch, one a root; empty: by their number of images.
        epoch_size: images an epoch; 0: the number of images found (with weights: of the roots together).
        decoder: dali, dali_mixed (JPEG decoded on the GPU) or pillow; auto: dali where there is a GPU and it is
            installed, else pillow.
        augment: fused (one launch makes all views) or dali (DALI's operators in a fixed order, without the
            piecewise affine map).
        workers: decoding threads; 0: all CPUs of the process.
        prefetch: batches prepared ahead.
        max_pixels: larger pictures are treated as broken records (decompression bombs).
        min_side: pictures with a side shorter than this many pixels are treated as broken records.
        rotate: tall turns pictures of 1.5 times their width in height, or more, by 90 degrees anticlockwise, so that
            text that runs downwards lies; never shows every picture as it stands.
    """

    roots: list[str] | str = field(default_factory=list)
    weights: list[float] = number([], above=0)
    epoch_size: int = number(0, low=0)
    decoder: Literal["auto", "dali", "dali_mixed", "pillow"] = "auto"
    augment: Literal["fused", "dali"] = "fused"
    workers: int = number(0, low=0, high=1024)
    prefetch: int = number(2, low=1, high=1024)
    max_pixels: int = number(16_000_000, low=1)
    min_side: int = number(2, low=1)
    rotate: Literal["never", "tall"] = "never"

    def __post_init__(self) -> None:
        self.roots = as_list(self.roots)


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        encoder: resnet29, vit_tiny, vit_small or vit_base.
        width: channel multiplier of ResNet-29: 1, 0.5, 0.25 or 0.125.
        depth: transformer blocks of the ViT.
        height: input height in pixels.
        image_width: input width in pixels; 0: 100 for the CNN, 128 for the ViT.
        tps: rectifier before the encoder.
        tps_checkpoint: safetensors file with the rectifier's weights, needed by tps=frozen
            (`random` takes an untrained one, as the released RCLSTR code does).
        tps_align_corners: the rectifier samples with align_corners=True, as the networks of DTRB and RCLSTR do; its
            corner points then lie on the centres of the corner pixels. Null: by preset (true for rclstr_code).
        sequence: what follows the columns inside the encoder: nothing, or two bidirectional LSTM layers
            (SeqCLR's R = H), which are exported and frozen with it.
        sequence_units: LSTM units a direction of sequence=bilstm, and channels of its frames.
        class_token: the ViT gets a learned token of its own beside those of the patches; null: where the method needs one.
        final_norm: the ViT ends with a LayerNorm; null: yes, but for methods that have none (dig).
        projector_hidden: units a direction of the BiLSTM projector (CNN) or hidden width of the MLP (ViT);
            0: 256 (CNN), 4096 (ViT).
        feature_dim: size D of query, key and queue rows; 0: 128 (CNN), 256 (ViT).
    """

    encoder: Literal["resnet29", "vit_tiny", "vit_small", "vit_base"] = "resnet29"
    width: float = number(1.0, low=0.125, high=1)
    depth: int = number(12, low=1, high=1000)
    height: int = number(32, low=32, high=32)
    image_width: int = number(0, low=0, high=4096)
    tps: Literal["none", "frozen", "trainable"] = "none"
    tps_checkpoint: str = ""
    tps_align_corners: bool | None = None
    sequence: Literal["none", "bilstm"] = "none"
    sequence_units: int = number(256, low=1, high=65536)
    class_token: bool | None = None
    final_norm: bool | None = None
    projector_hidden: int = number(0, low=0, high=65536)
    feature_dim: int = number(0, low=0, high=65536)


@dataclass(frozen=True)
class Training:
    """How a method is trained where the user does not say otherwise.

    Attributes:
        batch: images a step.
        epochs: passes over the data.
        optimizer: adamw, sgd or adadelta.
        lr: learning rate; that of `lr_batch` images.
        lr_batch: the rate grows in proportion to the batch from here; 0: it is the same for every batch.
        weight_decay: of the optimiser.
        schedule: cosine, constant or step.
        warmup_steps: steps of linear warm-up; None: 5,000, at most a tenth of the run.
        min_lr: end of the cosine, never above the rate itself.
        clip: gradient-norm limit; 0: none.
    """

    batch: int = 256
    epochs: int = 5
    optimizer: str = "adamw"
    lr: float = 1.5e-4
    lr_batch: int = 256
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_steps: int | None = None
    min_lr: float = 0.0
    clip: float = 0.0


@dataclass
class MethodConfig:
    """What the configuration of every pretraining method has; each method's own is in `rcmstr_fast.methods`.

    A method's configuration derives from this class, adds its fields and gives `name` its own name as the default.

    Attributes:
        name: the method; `rcmstr methods` lists them, and `rcmstr pretrain --method.name NAME --help` its fields.
        bn_group_size: images that share batch-norm statistics in training; 0: the images of a forward pass.
    """

    #: Training on a CNN and on a ViT; a method overrides what differs.
    cnn: ClassVar[Training] = Training()
    vit: ClassVar[Training] = Training(batch=1024, epochs=10, weight_decay=0.1, min_lr=1e-5)
    #: Encoders that the method serves, filled in by its registration; empty: all.
    encoders: ClassVar[tuple[str, ...]] = ()

    name: str = ""
    bn_group_size: int = number(0, low=0)

    def fill(self, run: "PretrainConfig") -> None:
        """Replace null fields by what preset and method say, in place; a second call changes nothing."""

    def check(self, run: "PretrainConfig") -> None:
        """Raise ConfigError where fields do not fit each other or the model; ranges have been checked already."""

    def training(self, run: "PretrainConfig") -> Training:
        """Defaults of optimiser, batch and length for this run."""
        return self.vit if is_vit(run.model) else self.cnn


def require(holds: object, expected: str, got: object) -> None:
    """Raise ConfigError `expected, got ...` unless `holds`."""
    if not holds:
        raise ConfigError(f"{expected}, got {got!r}")


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Attributes:
        name: adamw, sgd or adadelta; null: by method.
        lr: learning rate at the given batch; null: by method (1.5e-4 * batch / 256 for most).
        weight_decay: null: by method and encoder; AdamW leaves out batch norm, biases and tokens.
        weight_decay_end: AdamW's weight decay at the end of the run, reached from weight_decay by half a cosine; null:
            it stays.
        sgd_momentum: momentum of SGD.
        beta1: AdamW.
        beta2: AdamW.
        rho: decay of AdaDelta's averages.
        schedule: cosine, constant or step (a tenth of the rate from 60 % of the run on, a hundredth from 80 % on);
            null: by method.
        warmup_steps: steps of linear warm-up; null: by method (mostly 5,000, at most a tenth of the run).
        min_lr: end of the cosine; null: by method, never above lr.
        clip: gradient-norm limit; 0: off; null: by method.
    """

    name: Literal["adamw", "sgd", "adadelta"] | None = None
    lr: float | None = number(None, above=0)
    weight_decay: float | None = number(None, low=0)
    weight_decay_end: float | None = number(None, low=0)
    sgd_momentum: float = number(0.9, low=0, below=1)
    beta1: float = number(0.9, low=0, below=1)
    beta2: float = number(0.999, low=0, below=1)
    rho: float = number(0.95, low=0, below=1)
    schedule: Literal["cosine", "constant", "step"] | None = None
    warmup_steps: int | None = number(None, low=0)
    min_lr: float | None = number(None, low=0)
    clip: float | None = number(None, low=0)


@dataclass
class TrainConfig:
    """The run.

    Attributes:
        global_batch_size: images a step over all processes and accumulation steps; null: by preset and encoder.
        accumulate: micro-batches a step.
        epochs: passes over the data; null: by preset and encoder.
        steps: steps of the whole run; 0: as many as `epochs` have.
        init: encoder.safetensors (or a run folder) from whose weights encoder and rectifier start; empty: untrained.
        precision: fp32, bf16 (autocast) or auto (bf16 where the hardware multiplies it); fp64 is for comparing runs:
            slow, but what rounding does to a run is not amplified into view.
        device: auto, cpu or cuda.
        log_every: steps between lines of metrics.jsonl, and of the trackers.
        trackers: where these lines go beside it, any of tensorboard, wandb and mlflow (the last two are the extra
            `tracking`); a tracker that fails is left out, and the run goes on.
        save_every: steps between checkpoints; 0: at the end of each epoch.
        save_minutes: wall-clock minutes after which a checkpoint is written in between; 0: never.
        picture_every: steps between contact sheets (views.png); 0: at the start and at the end only.
        probe_every: steps between measurements of the encoder by a small probe on labelled words, which changes nothing
            of the training; 0: none.
        probe_data: LMDB or image folders with the labelled words of that probe.
        probe_words: how many of them it takes, a seeded choice; it learns from two thirds and is tested on the others.
        probe_charset: characters of the probe (36, 62, 94 or a file); where less than half of the labels can be written
            in it, words are compared as wholes, by their nearest neighbour.
        max_nonfinite: consecutive steps with a non-finite loss or gradient before the run stops.
        timeout_minutes: wall-clock minutes that one process waits for the others before it names the silent one and ends.
        deterministic: ask torch for deterministic algorithms.
        cuda_graph: record the whole step once and replay it as one CUDA graph (with several processes: as graphs between
            their exchanges); auto: on a GPU with a single process.
        compile: torch.compile the networks' dense forward passes; auto: where a tuned run has measured it faster.
        tune: measure on this machine what a run may choose (storage of masked stages, launches, threads, ..) before its
            first step, once, and keep it; auto: for runs of 1,000 steps or more; off: what is predicted.
        checkpoint_activations: keep only the inputs of each residual stage or transformer block and compute the rest
            again in backward: less memory, more time, the same gradients.
    """

    global_batch_size: int | None = number(None, low=2)
    accumulate: int = number(1, low=1)
    epochs: int | None = number(None, low=0)
    steps: int = number(0, low=0)
    init: str = ""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = number(10, low=1)
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])
    save_every: int = number(0, low=0)
    save_minutes: float = number(10.0, low=0)
    picture_every: int = number(0, low=0)
    probe_every: int = number(0, low=0)
    probe_data: list[str] | str = field(default_factory=list)
    probe_words: int = number(400, low=3)
    probe_charset: str = "36"
    max_nonfinite: int = number(3, low=1)
    timeout_minutes: float = number(10.0, above=0, high=1e5)
    deterministic: bool = False
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    tune: Literal["auto", "on", "off"] = "auto"
    checkpoint_activations: bool = False


@dataclass
class PretrainConfig:
    """Everything `rcmstr pretrain` needs.

    Attributes:
        run: the run folder; an existing run with the same configuration is continued.
        preset: the combination of choices that fills in null fields.
        seed: the one seed; every random choice is a function of it.
        data: the images.
        model: the network.
        method: the method; an instance of its own configuration class.
        optim: the optimiser.
        train: the run.
    """

    run: str = "runs/pretrain"
    preset: Literal["paper", "rclstr_code", "fast"] = "paper"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def is_vit(model: ModelConfig) -> bool:
    """Whether the encoder is a ViT; otherwise it is a CNN."""
    return model.encoder.startswith("vit")


def _fill(config: object, values: dict) -> None:
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def _fill_training(config: PretrainConfig) -> None:
    """Optimiser, batch and length of the run where they are null."""
    training = config.method.training(config)
    batch = config.train.global_batch_size or training.batch
    lr = training.lr * (batch / training.lr_batch if training.lr_batch else 1.0)
    least = min(training.min_lr, config.optim.lr or lr) if training.min_lr else 0.0
    optim = {
        "name": training.optimizer,
        "lr": lr,
        "weight_decay": training.weight_decay,
        "schedule": training.schedule,
        "min_lr": least,
        "clip": training.clip,
        "warmup_steps": training.warmup_steps,
    }
    _fill(config.optim, optim)
    _fill(config.train, {"global_batch_size": batch, "epochs": training.epochs})


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Fill the fields of `model` that are 0 from its encoder, in place; a second call changes nothing."""
    vit = is_vit(model)
    model.image_width = model.image_width or (128 if vit else 100)
    model.feature_dim = model.feature_dim or (256 if vit else 128)
    model.projector_hidden = model.projector_hidden or (4096 if vit else 256)
    model.tps_align_corners = bool(model.tps_align_corners)
    model.class_token = bool(model.class_token)
    model.final_norm = model.final_norm is None or model.final_norm
    return model


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Fill every null field from preset and method, and check what needs no data.

    Args:
        config: changed in place; a second call changes nothing.
            `optim.warmup_steps` stays null until the number of steps is known.
    Returns:
        The same object.
    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    check_fields(config)
    method = config.method
    if method.encoders and config.model.encoder not in method.encoders:
        served = ", ".join(method.encoders)
        raise ConfigError(f"model.encoder must be one of {served} for method {method.name}, got {config.model.encoder}")
    method.fill(config)
    _fill_training(config)
    _fill(config.model, {"tps_align_corners": config.preset == "rclstr_code"})
    resolve_model(config.model)
    check_fields(config)
    _check(config)
    method.check(config)
    return config


def num_frames(model: ModelConfig) -> int:
    """Frames T of an image: width / 4, and one more for the CNN."""
    return model.image_width // 4 + (0 if is_vit(model) else 1)


def _check(config: PretrainConfig) -> None:
    model = config.model
    rules = [
        (model.width in (0.125, 0.25, 0.5, 1.0), "model.width must be 0.125, 0.25, 0.5 or 1", model.width),
        (model.image_width % 4 == 0 and model.image_width >= 16, "model.image_width must be a multiple of 4 from 16",
         model.image_width),
        (is_vit(model) or not model.class_token, "model.class_token must be false for a CNN", model.class_token),
        (is_vit(model) or model.final_norm, "model.final_norm must be true for a CNN", model.final_norm),
        (not config.train.probe_every or config.train.probe_data,
         "train.probe_data must name labelled words for train.probe_every", config.train.probe_data),
        (model.tps != "frozen" or model.tps_checkpoint, "model.tps_checkpoint must name a file for model.tps=frozen",
         model.tps_checkpoint),
        (not config.data.weights or len(config.data.weights) == len(config.data.roots),
         "data.weights must have one weight a root", config.data.weights),
        (config.method.bn_group_size != 1, "method.bn_group_size must be 0 or at least 2: one image has no batch "
         "statistics", config.method.bn_group_size),
        (config.optim.weight_decay_end is None or config.optim.name == "adamw",
         "optim.name must be adamw for optim.weight_decay_end", config.optim.name),
        (float(config.optim.min_lr or 0) <= float(config.optim.lr or 0), "optim.min_lr must be at most optim.lr",
         config.optim.min_lr),
    ]  # fmt: skip
    for holds, expected, got in rules:
        require(holds, expected, got)
