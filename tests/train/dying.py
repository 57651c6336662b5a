"""The toy run that is killed at chosen points of a save: `python -m tests.train.dying RUN die=POINT,POINT,.. field=value ..`

A point is WHEN:NAME: the process dies `before` the file NAME gets its name, `within` its writing (half of it is there), or
`after`. Each process takes the next point of the list, as the lines of RUN.died say, and the second time that it comes by;
one for which no point is left goes on to the end.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train import toy

#: Every point of a save: best.pt, the fresh checkpoint, the two renames that put it in its place, the export.
POINTS = [
    f"{when}:{name}"
    for name in ("best.pt", "next.pt", "previous.pt", "last.pt", "encoder.safetensors")
    for when in (("before", "after") if name in ("previous.pt", "last.pt") else ("within", "before", "after"))
]


def _die(run: str, point: str) -> None:
    with open(f"{run}.died", "a", encoding="utf-8") as file:
        file.write(f"{point}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def arm(run: str, point: str) -> None:
    """Let this process die at the point."""
    when, name = point.split(":")
    passed = 1 if name == "best.pt" else 0  # it is not written at every save
    replace, fsync = os.replace, os.fsync

    def here() -> bool:
        nonlocal passed
        passed += 1
        return passed == 2

    def replaced(source: Any, target: Any) -> None:
        dies = when != "within" and Path(target).name == name and here()
        if dies and when == "before":
            _die(run, point)
        replace(source, target)
        if dies:
            _die(run, point)

    def flushed(descriptor: int) -> None:
        written = os.readlink(f"/proc/self/fd/{descriptor}")
        if when == "within" and Path(written).name == f".{name}.tmp" and here():
            os.truncate(written, os.path.getsize(written) // 2)
            _die(run, point)
        fsync(descriptor)

    os.replace, os.fsync = replaced, flushed


def main(argv: list[str], then: Callable[[list[str]], int] = toy.main) -> int:
    """The run of `tests.train.toy`."""
    run, words = argv[0], [word for word in argv if not word.startswith("die=")]
    points = next((word[4:].split(",") for word in argv if word.startswith("die=")), [])
    died = Path(f"{run}.died")
    past = len(died.read_text().splitlines()) if died.exists() else 0
    if past < len(points) and os.environ.get("RANK", "0") == "0":
        arm(run, points[past])
    return then(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
