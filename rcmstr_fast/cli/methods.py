"""`rcmstr methods`: every pretraining method, what it needs, and its recipes."""

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.recipe_files import FOLDER

NAME = "methods"
HELP = "list the pretraining methods: paper, encoders, needs, recipes"
_COLUMNS = ("method", "encoders", "needs", "recipes", "paper")


def add_arguments(parser: Parser) -> None:
    """None."""


def run(arguments: Namespace) -> int:
    """Print the table."""
    from rcmstr_fast.methods import every_method

    rows = [_COLUMNS]
    for spec in every_method():
        named = any(need.startswith("labels") for need in spec.needs)
        needs = [*spec.needs, *(["labels"] if spec.labels and not named else [])]
        rows.append(
            (
                spec.name,
                _short(spec.encoders),
                ", ".join(needs) or "-",
                ", ".join(recipes(spec.name)) or "-",
                spec.paper,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def recipes(name: str) -> list[str]:
    """Recipes of a method, without folder and ending, and those of its variants (`cnn_NAME_VARIANT`)."""
    wanted = [f"{size}{kind}_{name}" for size in ("", "tiny_") for kind in ("cnn", "vit")]
    return [
        path.stem for stem in wanted for ending in ("", "_*") for path in sorted(FOLDER.glob(f"{stem}{ending}.yaml"))
    ]


def _short(encoders: tuple[str, ...]) -> str:
    """resnet29, vit_tiny, .. as cnn, vit; single encoders where not all of a kind are served."""
    from rcmstr_fast.methods import CNN, VIT

    kinds = [name for name, kind in (("cnn", CNN), ("vit", VIT)) if set(kind) <= set(encoders)]
    return ", ".join([*kinds, *(x for x in encoders if x not in CNN + VIT)] or encoders)
