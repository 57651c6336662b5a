"""Two trainers in every process of a run, one of which replays its steps from a tape: both must come to the same."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from rcmstr_fast.train.distributed import joined


def main(argv: list[str]) -> int:
    """Six steps of a small method; 1 with the difference on stderr where there is one."""
    os.environ["RCMSTR_FAST_BACKEND"] = "reference"
    torch.set_num_threads(1)
    from tests.train.test_captured import assert_equal_state, make_trainer, take, tape

    with tempfile.TemporaryDirectory() as folder, joined("cpu") as world:
        direct, replayed = (make_trainer(Path(folder) / name, world=world, name="rclstr") for name in ("a", "b"))
        take(replayed, 1, monitor_every=1)  # which gradients there are is learned, and told, in a step of its own
        take(direct, 1, monitor_every=1)
        recorder = tape(replayed)
        one, other = take(direct, 5), take(replayed, 5)
        if one != other or recorder.parts != 5:
            print(one, other, recorder.parts, file=sys.stderr)
            return 1
        assert_equal_state(direct, replayed)
    return 0
