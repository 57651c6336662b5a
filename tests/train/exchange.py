"""Processes that do nothing but exchange numbers, one of which falls silent: `python -m tests.train.exchange HOW`."""

import os
import signal
import sys
import time

import torch

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.train.distributed import joined


def main(argv: list[str]) -> int:
    """Exchange ten times with a patience of `argv[1]` minutes; the last process `freeze`s or `sleep`s at the fifth."""
    how, minutes = argv[0], float(argv[1])
    try:
        with joined("cpu", minutes) as world:
            for number in range(10):
                if number == 4 and world.rank == world.world_size - 1:
                    if how == "freeze":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    if how == "sleep":
                        time.sleep(600)
                world.mean(torch.ones(2))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
