"""Progress of long loops: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from rcmstr_fast import env

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Records that a thread takes at once.
CHUNK = 512
_QUIET, _EVERY = 2.0, 10.0


def progress(items: Iterable[Item], total: int, doing: str, unit: str) -> Iterator[Item]:
    """The items, with progress, rate and remaining time on stderr once the loop has taken two seconds.

    Args:
        items: passed through.
        total: number of items expected.
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
            left = max(total - done, 0) / rate
            print(f"{doing}: {done} of {total} {unit}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)


def in_threads(part: Callable[[range], Result], total: int, threads: int, doing: str) -> Iterator[Result]:
    """`part` of every chunk of 0..total, in order, with progress; few chunks are held at a time.

    Args:
        part: called in threads.
        total: records.
        threads: 0: as many as `env.threads()`.
        doing: as in `progress`.
    """
    threads = threads or env.threads()
    chunks = iter([range(first, min(first + CHUNK, total)) for first in range(0, total, CHUNK)])

    def results() -> Iterator[Result]:
        with ThreadPoolExecutor(threads) as pool:
            waiting = [pool.submit(part, chunk) for chunk in islice(chunks, 2 * threads)]
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(part, chunk) for chunk in islice(chunks, 1)]
                yield result

    yield from progress(results(), -(-total // CHUNK), doing, f"blocks of {CHUNK} images")
