"""`python -m bench.gpu.train CONFIG.json`: a pretraining run without the command line's parser, which needs a library."""

import json
import sys
from pathlib import Path

from bench.gpu.recipes import configured
from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.train.loop import pretrain


def main(words: list[str]) -> int:
    """Pretrain with the `values` and `changes` of a JSON file; exit status as of `rcmstr pretrain`."""
    try:
        asked = json.loads(Path(words[0]).read_text(encoding="utf-8"))
        pretrain(configured(asked["values"], tuple(asked["changes"])))
    except (ConfigError, RunError) as error:
        print(f"bench.gpu.train: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
