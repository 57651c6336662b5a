"""The configuration: plain dataclasses, one field a choice; stdlib only, imported by every layer.

The command line, the YAML recipes and `config.yaml` of a run folder all have exactly these fields.
Values that a preset or a method decides are None here and filled in by `resolve`.
"""

from dataclasses import dataclass, field
from typing import Literal

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

    def __post_init__(self) -> None:
        self.roots = as_list(self.roots)


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        encoder: resnet29, vit_tiny, vit_small or vit_base.
        width: channel multiplier of ResNet-29: 1, 0.5 or 0.25.
        depth: transformer blocks of the ViT.
        height: input height in pixels.
        image_width: input width in pixels; 0: 100 for the CNN, 128 for the ViT.
        tps: rectifier before the encoder.
        tps_checkpoint: safetensors file with the rectifier's weights, needed by tps=frozen
            (`random` takes an untrained one, as the released RCLSTR code does).
        projector_hidden: units a direction of the BiLSTM projector (CNN) or hidden width of the MLP (ViT);
            0: 256 (CNN), 4096 (ViT).
        feature_dim: size D of query, key and queue rows; 0: 128 (CNN), 256 (ViT).
    """

    encoder: Literal["resnet29", "vit_tiny", "vit_small", "vit_base"] = "resnet29"
    width: float = number(1.0, low=0.25, high=1)
    depth: int = number(12, low=1, high=1000)
    height: int = number(32, low=32, high=32)
    image_width: int = number(0, low=0, high=4096)
    tps: Literal["none", "frozen", "trainable"] = "none"
    tps_checkpoint: str = ""
    projector_hidden: int = number(0, low=0, high=65536)
    feature_dim: int = number(0, low=0, high=65536)


@dataclass
class MethodConfig:
    """The pretraining method and every switch of its ablations.

    Attributes:
        name: seqmoco, rclstr or rcmstr; fills in the fields that are null.
        levels: feature levels with a contrastive loss; null: subword (seqmoco), all three otherwise.
        kl: use the KL half of the relational loss (SeqMoCo with or without KL).
        permute: the enriched relations (ERE): a second, permuted query; null: by method.
        inter: inter-level terms; null: none (seqmoco), both otherwise.
        inter_loss: loss of the inter-level terms.
        inter_weight: weight of the inter-level terms; null: by preset.
        inter_pairing: how frames pair with subwords: stride windows or the pooling windows.
        inter_after_enqueue: inter-level terms see this step's keys in the queue (preset rclstr_code).
        division: where images are cut for the permutation.
        num_patches: strips an image (N).
        group_size: images whose strips are shuffled together (M).
        shared_permutation: one permutation for all groups of a batch (preset rclstr_code).
        num_subwords: subwords an image (S).
        alpha: weight of loss_kl in loss_re.
        beta: weight of loss_rcl beside loss_mim.
        tau_info: temperature of loss_info.
        tau_kl: temperature of loss_kl.
        kl_reduction: sum over the queue (the paper's equation) or mean (preset rclstr_code: divided by K too).
        queue_size: rows of each level's queue (K).
        queue: replicated (every process holds all rows) or sharded (K / processes each, gathered for each comparison;
            the same losses).
        round_frame_queue: round the frame queue down to a multiple of T*B (preset rclstr_code).
        enqueue_per_image: frame keys enqueued an image; 0: all.
        momentum: momentum m of the key encoder.
        bn_group_size: images that share batch-norm statistics in training; 0: the local batch.
        bn_shuffle: group the key side at random (prevents batch-norm leakage between query and key).
        mask_ratio: hidden share of the mask units.
        num_blocks: hidden blocks of 16 pixels, full height.
        mask_unit: unit of the CNN's mask (the ViT masks its tokens).
        mask_rule: how the mask crosses the 25 -> 26 column pool.
        norm_pix: reconstruct pixels normalised a mask unit.
        coupled: the masked view is also the query (the paper's ablation; decoupled by default).
    """

    name: Literal["seqmoco", "rclstr", "rcmstr"] = "rcmstr"
    levels: list[Level] | None = None
    kl: bool = True
    permute: bool | None = None
    inter: Literal["none", "s2w", "f2s", "both"] | None = None
    inter_loss: Literal["kl", "info", "re"] = "kl"
    inter_weight: float | None = None
    inter_pairing: Literal["stride", "pool"] = "stride"
    inter_after_enqueue: bool | None = None
    division: Literal["direct", "drop_boundary", "vertical_projection"] = "direct"
    num_patches: int = 2
    group_size: int = 2
    shared_permutation: bool | None = None
    num_subwords: int = 4
    alpha: float = 0.3
    beta: float = 0.1
    tau_info: float = 0.07
    tau_kl: float = 0.04
    kl_reduction: Literal["sum", "mean"] | None = None
    queue_size: int = 65536
    queue: Literal["replicated", "sharded"] = "replicated"
    round_frame_queue: bool | None = None
    enqueue_per_image: int = 0
    momentum: float = 0.999
    bn_group_size: int = 0
    bn_shuffle: bool = True
    mask_ratio: float = 0.7
    num_blocks: int = 1
    mask_unit: Literal["lattice", "stage3", "column"] = "stage3"
    mask_rule: Literal["anchored", "any"] = "anchored"
    norm_pix: bool = False
    coupled: bool = False


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Attributes:
        name: adamw or sgd; null: by preset.
        lr: learning rate at the given batch; null: by preset (1.5e-4 * batch / 256 for AdamW, 0.0015 for SGD).
        weight_decay: null: by preset and encoder; AdamW leaves out batch norm, biases and tokens.
        sgd_momentum: momentum of SGD.
        beta1: AdamW.
        beta2: AdamW.
        schedule: cosine or constant; null: by preset.
        warmup_steps: steps of linear warm-up; null: by preset (5,000, at most a tenth of the run).
        min_lr: end of the cosine; null: 0 (CNN), 1e-5 (ViT), never above lr.
        clip: gradient-norm limit; 0: off.
    """

    name: Literal["adamw", "sgd"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    sgd_momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["cosine", "constant"] | None = None
    warmup_steps: int | None = None
    min_lr: float | None = None
    clip: float = 0.0


@dataclass
class TrainConfig:
    """The run.

    Attributes:
        global_batch_size: images a step over all processes and accumulation steps; null: by preset and encoder.
        accumulate: micro-batches a step.
        epochs: passes over the data; null: by preset and encoder.
        steps: steps of the whole run; 0: as many as `epochs` have.
        precision: fp32, bf16 (autocast) or auto (bf16 where the hardware multiplies it); fp64 is for comparing runs:
            slow, but what rounding does to a run is not amplified into view.
        device: auto, cpu or cuda.
        log_every: steps between log lines.
        save_every: steps between checkpoints; 0: at the end of each epoch.
        save_minutes: wall-clock minutes after which a checkpoint is written in between; 0: never.
        picture_every: steps between contact sheets (views.png); 0: at the start and at the end only.
        max_nonfinite: consecutive steps with a non-finite loss or gradient before the run stops.
        timeout_minutes: wall-clock minutes that one process waits for the others before it names the silent one and ends.
        deterministic: ask torch for deterministic algorithms.
        cuda_graph: record the whole step once and replay it as one CUDA graph; auto: on a GPU with a single process.
        compile: torch.compile the networks' dense forward passes; auto: where it was measured faster.
        checkpoint_activations: keep only the inputs of each residual stage or transformer block and compute the rest
            again in backward: less memory, more time, the same gradients.
    """

    global_batch_size: int | None = number(None, low=2)
    accumulate: int = number(1, low=1)
    epochs: int | None = number(None, low=0)
    steps: int = number(0, low=0)
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = number(10, low=1)
    save_every: int = number(0, low=0)
    save_minutes: float = number(10.0, low=0)
    picture_every: int = number(0, low=0)
    max_nonfinite: int = number(3, low=1)
    timeout_minutes: float = number(10.0, above=0, high=1e5)
    deterministic: bool = False
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
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
        method: the method.
        optim: the optimiser.
        train: the run.
    """

    run: str = "runs/pretrain"
    preset: Literal["paper", "rclstr_code", "fast"] = "fast"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_METHODS = {
    "seqmoco": {"levels": ["subword"], "permute": False, "inter": "none"},
    "rclstr": {"levels": list(LEVELS), "permute": True, "inter": "both"},
    "rcmstr": {"levels": list(LEVELS), "permute": True, "inter": "both"},
}
_PRESETS = {
    "paper": {"inter_weight": 1.0, "inter_after_enqueue": False, "shared_permutation": False,
              "kl_reduction": "sum", "round_frame_queue": False},
    "rclstr_code": {"inter_weight": 0.3, "inter_after_enqueue": True, "shared_permutation": True,
                    "kl_reduction": "mean", "round_frame_queue": True},
    "fast": {"inter_weight": 0.3, "inter_after_enqueue": False, "shared_permutation": False,
             "kl_reduction": "sum", "round_frame_queue": False},
}  # fmt: skip


def _fill(config: object, values: dict) -> None:
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def _training_defaults(config: PretrainConfig) -> dict[str, dict]:
    """SPEC section 8: the training rows of the presets, for the optimiser and for the run."""
    vit = config.model.encoder.startswith("vit")
    if config.preset == "rclstr_code" and not vit:
        batch = config.train.global_batch_size or 32
        optim = {"name": "sgd", "lr": 0.0015, "weight_decay": 1e-4, "schedule": "constant", "warmup_steps": 0}
        return {"optim": optim | {"min_lr": 0.0}, "train": {"global_batch_size": batch, "epochs": 5}}
    batch = config.train.global_batch_size or (1024 if vit else 256)
    lr = 1.5e-4 * batch / 256
    optim = {"name": "adamw", "lr": lr, "weight_decay": 0.1 if vit else 0.05, "schedule": "cosine"}
    return {
        "optim": optim | {"min_lr": min(1e-5, config.optim.lr or lr) if vit else 0.0},
        "train": {"global_batch_size": batch, "epochs": 10 if vit else 5},
    }


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Fill the fields of `model` that are 0 from its encoder, in place; a second call changes nothing."""
    vit = model.encoder.startswith("vit")
    model.image_width = model.image_width or (128 if vit else 100)
    model.feature_dim = model.feature_dim or (256 if vit else 128)
    model.projector_hidden = model.projector_hidden or (4096 if vit else 256)
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
    _fill(config.method, _METHODS[config.method.name])
    _fill(config.method, _PRESETS[config.preset])
    defaults = _training_defaults(config)
    _fill(config.optim, defaults["optim"])
    _fill(config.train, defaults["train"])
    resolve_model(config.model)
    _check(config)
    return config


def num_frames(model: ModelConfig) -> int:
    """Frames T of an image: width / 4, and one more for the CNN (SPEC section 2)."""
    return model.image_width // 4 + (0 if model.encoder.startswith("vit") else 1)


def _check(config: PretrainConfig) -> None:
    method, model = config.method, config.model
    rules = [
        (bool(method.levels), "method.levels must name at least one level", method.levels),
        (method.num_patches >= 1, "method.num_patches must be 1 or more", method.num_patches),
        (method.group_size >= 1, "method.group_size must be 1 or more", method.group_size),
        (method.queue_size >= 1, "method.queue_size must be 1 or more", method.queue_size),
        (0 <= method.mask_ratio <= 1, "method.mask_ratio must be in [0, 1]", method.mask_ratio),
        (method.tau_info > 0, "method.tau_info must be positive", method.tau_info),
        (method.tau_kl > 0, "method.tau_kl must be positive", method.tau_kl),
        (0 <= method.momentum <= 1, "method.momentum must be in [0, 1]", method.momentum),
        (model.width in (0.25, 0.5, 1.0), "model.width must be 0.25, 0.5 or 1", model.width),
        (model.image_width % 4 == 0 and model.image_width >= 16, "model.image_width must be a multiple of 4 from 16",
         model.image_width),
        (model.tps != "frozen" or model.tps_checkpoint, "model.tps_checkpoint must name a file for model.tps=frozen",
         model.tps_checkpoint),
        (not config.data.weights or len(config.data.weights) == len(config.data.roots),
         "data.weights must have one weight a root", config.data.weights),
    ]  # fmt: skip
    for holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"{expected}, got {got!r}")
    frames = num_frames(model)
    if method.permute and frames % method.num_patches:
        raise ConfigError(
            f"method.num_patches must divide the {frames} frames of a {model.image_width}-pixel image, "
            f"got {method.num_patches}"
        )
    if method.permute and model.image_width % method.num_patches:
        raise ConfigError(
            f"method.num_patches must divide the image width {model.image_width}, got {method.num_patches}"
        )
    if method.num_subwords > frames or method.num_subwords < 1:
        raise ConfigError(f"method.num_subwords must be in 1..{frames}, got {method.num_subwords}")
