"""`rcmstr pretrain`: self-supervised pretraining into a run folder.

On several GPUs: `torchrun --nproc_per_node N -m -- rcmstr_fast.cli.main pretrain ...`.
"""

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining

NAME = "pretrain"
HELP = "pretrain an encoder on unlabelled word images; run it again to continue"


def add_arguments(parser: Parser) -> None:
    """Every field of PretrainConfig, with those of the method that is named."""
    add_pretraining(parser)


def run(arguments: Namespace) -> int:
    """Pretrain; under torchrun this is one of its processes."""
    config = to_pretraining(arguments)
    from rcmstr_fast.train.loop import pretrain

    pretrain(config)
    return 0
