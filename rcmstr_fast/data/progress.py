"""Progress of long loops: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_QUIET, _EVERY = 2.0, 10.0


def progress(items: Iterable[Item], total: int | None, doing: str, unit: str) -> Iterator[Item]:
    """The items, with progress, rate and remaining time on stderr once the loop has taken two seconds.

    Args:
        items: passed through.
        total: number of items expected; None: not known.
        doing: what is done, such as "rendering".
        unit: what an item is, in the plural.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=doing, unit=f" {unit}", delay=_QUIET, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= (_EVERY if last > start else _QUIET):
            last = now
            rate = done / (now - start)
            of, left = "", ""
            if total is not None:
                of, left = f" of {total}", f", {max(total - done, 0) / rate:.0f} s left"
            print(f"{doing}: {done}{of} {unit}, {rate:.3g}/s{left}", file=sys.stderr, flush=True)
