"""The table of recipes: what each trains with, and, by arithmetic, how long it takes and how much memory it needs."""

from collections.abc import Iterable
from dataclasses import dataclass

import yaml

from bench.report.rows import number
from rcmstr_fast import recipe_files
from rcmstr_fast.config import PretrainConfig, is_vit, num_frames, resolve
from rcmstr_fast.evaluation.report import markdown
from rcmstr_fast.measure.ceilings import Ceilings
from rcmstr_fast.methods import costs, find, settings
from rcmstr_fast.methods.levels import RelationalSettings, used_levels
from rcmstr_fast.train.utilisation import PEAKS

#: Images of the data that hours are given for: about those of Union14M-U.
IMAGES = 10_000_000
#: Share of the roofline that a step is taken to reach: the project's target (docs/performance.md).
SHARE = 0.65
#: GPU -> what it is taken to reach: dense bf16 products, and bytes read and written.
GPUS = {
    "A100": Ceilings(PEAKS["A100"].reached, 1.7e12, "data sheet"),
    "H200": Ceilings(PEAKS["H200"].reached, 4.3e12, "assumed"),
}
_PERCENT, _MILLIONS = round(100 * SHARE), IMAGES // 10**6
NOTE = f"""Hours are arithmetic, not a measurement. The model of a step (`rcmstr_fast/methods/costs.py`) counts
its operations and bytes. Divided by what the GPU reaches at best, this gives the shortest time. A step
is taken to reach {_PERCENT} % of it. Given are all epochs over {_MILLIONS} million crops on one GPU. Memory is what one GPU
holds at the recipe's whole batch: weights, optimiser, queues, views, and the activations that backward
needs, without `train.checkpoint_activations`. Several GPUs divide the batch, and `train.accumulate`
does so on one GPU. With a star the encoder's passes alone are counted, not the method's own heads and
losses: a little less than a run takes, for iBOT, SimAN and MaskOCR clearly less."""


@dataclass(frozen=True)
class Need:
    """What a recipe needs by arithmetic.

    Attributes:
        hours: GPU -> hours of the whole run over IMAGES crops.
        gib: memory of one GPU that takes the whole batch.
    """

    hours: dict[str, float]
    gib: float


def load(name: str) -> PretrainConfig:
    """The resolved configuration of a recipe."""
    held = yaml.safe_load(recipe_files.find(name).read_text(encoding="utf-8"))
    config = PretrainConfig(preset=held.get("preset", "paper"), method=settings(**held["method"]))
    for part in ("model", "optim", "train", "data"):
        for field, value in held.get(part, {}).items():
            setattr(getattr(config, part), field, value)
    return resolve(config)


def need(config: PretrainConfig) -> Need:
    """Hours and memory of a recipe.

    Args:
        config: resolved.
    """
    batch = int(config.train.global_batch_size or 0)
    works = costs.step_works(config, batch, "bf16")
    steps = config.train.steps or IMAGES // batch * int(config.train.epochs or 0)
    hours = {name: steps * ceilings.ms(works) / SHARE / 3.6e6 for name, ceilings in GPUS.items()}
    return Need(hours, (_activations(config, batch) + _state(config)) / 2**30)


def _activations(config: PretrainConfig, batch: int) -> float:
    """Bytes that backward needs of a bf16 step: inputs of the products and of the norms between them, and the views."""
    kept = 0.0
    for one in costs.encoder_passes(config):
        if one.trained:
            products = costs.pass_products(config, one)
            kept += sum(x.inputs * x.share for x in products) + costs.between_products(config, products)
    if isinstance(config.method, RelationalSettings):
        projected = 1 + bool(config.method.permute)
        frames, hidden = num_frames(config.model), config.model.projector_hidden
        kept += projected * 4 * frames * hidden * (1 if is_vit(config.model) else 10)  # gates of the LSTM, or the MLP
    views = len(find(config.method.name).method.views(config)) * 3 * config.model.height * config.model.image_width
    return 2.0 * batch * (kept + views)


def _state(config: PretrainConfig) -> float:
    """Bytes of weights, gradients, optimiser, momentum network and queues."""
    trained, followed = costs.parameters(config)
    own = 16 if config.optim.name == "adamw" else 12
    queues = 0
    if isinstance(config.method, RelationalSettings):
        queues = 4 * len(used_levels(config.method)) * config.method.queue_size * config.model.feature_dim
    return own * trained + 4 * followed + queues


def table(names: Iterable[str]) -> str:
    """A row a recipe."""
    body = []
    for name in names:
        config = load(name)
        found = need(config)
        hours = [number(found.hours[gpu], 1 if found.hours[gpu] < 10 else 0) for gpu in GPUS]
        mark = "" if isinstance(config.method, RelationalSettings) else "*"
        body.append(
            [
                f"`{name}`",
                config.method.name,
                _length(config),
                number(config.train.global_batch_size, 0),
                f"{config.optim.name} {config.optim.lr:g}",
                *(hour + mark for hour in hours),
                number(found.gib, 0) + mark,
            ]
        )
    heads = ["recipe", "method", "epochs", "batch", "optimiser, rate", *(f"{gpu}, h" for gpu in GPUS), "memory, GiB"]
    return markdown(heads, body, left=2)


def _length(config: PretrainConfig) -> str:
    """Epochs, or the steps where a recipe counts them."""
    return f"{config.train.steps:,} steps" if config.train.steps else str(config.train.epochs)


def block() -> str:
    """What stands in docs/recipes.md: full-size recipes with their needs, then the small ones."""
    names = recipe_files.names()
    full = [name for name in names if not name.startswith("tiny_")]
    return f"{table(full)}\n\n{NOTE}"
