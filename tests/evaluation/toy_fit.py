"""`main(["RUN", "DATA", "field=value", ...])`: a tiny probe in this process, as torchrun's processes run it.

`segment=true` makes it a segmentation. `python -m tests.evaluation.toy_fit` takes the points of a save at which it is
killed, too: `die=POINT,POINT,..`, as `tests.train.dying` has them.
"""

import json
import os
import signal
import sys
from pathlib import Path

from rcmstr_fast.config import RunError
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.probe import probe
from rcmstr_fast.evaluation.segment import segment
from tests.evaluation.pairs import tiny_segmentation
from tests.evaluation.rendered import tiny_config
from tests.train import dying


def main(words: list[str]) -> int:
    """Exit status of the run; `term=N` sends SIGTERM to rank 1 after N steps."""
    run, data, *fields = words
    changes = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    term, segments = changes.pop("term", None), changes.pop("segment", False)
    whole = Fit._update

    def update(self, *arguments):
        whole(self, *arguments)
        if self.step == term and self.world.rank == self.world.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Fit._update = update
    try:
        if segments:
            segment(tiny_segmentation(Path(data), run=run, **changes))
        else:
            probe(tiny_config(Path(data), run=run, **changes))
    except RunError as error:
        print(error, file=sys.stderr)
        return error.status
    finally:
        Fit._update = whole
    return 0


if __name__ == "__main__":
    sys.exit(dying.main(sys.argv[1:], main))
