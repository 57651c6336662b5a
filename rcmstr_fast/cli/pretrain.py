"""`rcmstr pretrain`: self-supervised pretraining into a run folder.

On several GPUs: `torchrun --nproc_per_node N -m -- rcmstr_fast.cli.main pretrain ...`.
"""

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.cli.arguments import add_dataclass, to_dataclass
from rcmstr_fast.config import PretrainConfig

NAME = "pretrain"
HELP = "pretrain an encoder on unlabelled word images; run it again to continue"


def add_arguments(parser: ArgumentParser) -> None:
    """Every field of PretrainConfig."""
    add_dataclass(parser, PretrainConfig)


def run(arguments: Namespace) -> int:
    """Pretrain; under torchrun this is one of its processes."""
    config = to_dataclass(PretrainConfig, arguments)
    from rcmstr_fast.train.loop import pretrain

    pretrain(config)
    return 0
