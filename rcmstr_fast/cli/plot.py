"""`rcmstr plot tsne|curves|attention|masks`: figures as SVG and PNG."""

from typing import Any

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.fields import Bounds

NAME = "plot"
HELP = "draw curves of runs, frames by t-SNE, attention and masks as SVG and PNG"


def add_arguments(parser: Parser) -> None:
    """The sub-commands."""
    commands = parser.add_subcommands()
    make = type(parser)

    curves = make(description="Draw metrics of runs over their steps.")
    curves.add_argument("runs", nargs="+", help="run folders of pretrainings, probes or segmentations")
    curves.add_argument(
        "--metrics", type=str, nargs="+", default=[], help="names in metrics.jsonl; default: the main ones"
    )
    _out(curves, "curves")
    commands.add_subcommand("curves", curves, help="metrics of runs over their steps")

    tsne = make(description="Draw frames of words by t-SNE, coloured by the character that a decoder finds in them.")
    tsne.add_argument("images", nargs="+", help="folders or LMDBs of (labelled) words")
    tsne.add_argument("--recogniser", required=True, help="run folder of a probe, whose encoder gives the frames")
    tsne.add_argument("--most", type=int, default=3000, bounds=Bounds(low=1), help="frames")
    tsne.add_argument(
        "--colours",
        type=int,
        default=20,
        bounds=Bounds(low=1),
        help="characters with a colour of their own, the frequent ones",
    )
    tsne.add_argument("--perplexity", type=float, default=30.0, bounds=Bounds(above=0), help="of t-SNE")
    tsne.add_argument("--seed", type=int, default=0, bounds=Bounds(low=0, high=2**32 - 1), help="of t-SNE")
    tsne.add_argument("--misread", action="store_true", help="also frames of words that are read wrongly")
    _out(tsne, "tsne")
    commands.add_subcommand("tsne", tsne, help="frames of words by character, in a plane")

    attention = make(description="Draw where a decoder looks for each character of a picture.")
    attention.add_argument("image", help="a picture of one word")
    attention.add_argument("--recogniser", required=True, help="run folder of a probe")
    _out(attention, "attention")
    commands.add_subcommand("attention", attention, help="where a decoder looks for each character")

    masks = make(description="Draw what masked image modelling hides of pictures.")
    masks.add_argument("images", nargs="+", help="pictures of one word each")
    masks.add_argument("--run", type=str, default="", help="run folder of a pretraining, whose masks are shown")
    masks.add_argument("--unit", type=str, default="token", help="token, lattice, stage3 or column")
    masks.add_argument(
        "--mask_ratio", type=float, default=0.7, bounds=Bounds(low=0, high=1), help="hidden share of the units"
    )
    masks.add_argument(
        "--num_blocks",
        type=int,
        default=1,
        bounds=Bounds(low=0, high=64),
        help="hidden blocks of 16 pixels, full height",
    )
    masks.add_argument("--draws", type=int, default=3, bounds=Bounds(low=1), help="masks of each picture")
    masks.add_argument("--seed", type=int, default=0, help="of the masks")
    _out(masks, "masks")
    commands.add_subcommand("masks", masks, help="what masked image modelling hides")


def _out(parser: Parser, name: str) -> None:
    parser.add_argument("--out", type=str, default=name, help="path of the figure; .svg and .png are written")


def run(arguments: Namespace) -> int:
    """Draw, and print what was written."""
    from rcmstr_fast import drawing
    from rcmstr_fast.plots.figures import stem_of

    chosen = arguments[arguments.subcommand]
    stem = stem_of(chosen.out)
    for path in drawing.write(_figure(arguments.subcommand, chosen, stem), stem):
        print(path)
    return 0


def _figure(name: str, chosen: Namespace, stem: Any) -> Any:
    from rcmstr_fast.plots import figures

    if name == "curves":
        return figures.curves_figure(chosen.runs, chosen.metrics)
    if name == "attention":
        return figures.attention_figure(chosen.recogniser, chosen.image)
    if name == "masks":
        return figures.masks_figure(
            chosen.images,
            run=chosen.run,
            unit=chosen.unit,
            mask_ratio=chosen.mask_ratio,
            num_blocks=chosen.num_blocks,
            draws=chosen.draws,
            seed=chosen.seed,
        )
    return figures.tsne_figure(
        chosen.recogniser,
        chosen.images,
        stem,
        most=chosen.most,
        perplexity=chosen.perplexity,
        seed=chosen.seed,
        misread=chosen.misread,
        colours=chosen.colours,
    )
