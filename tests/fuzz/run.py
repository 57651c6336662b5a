"""`python -m tests.fuzz.run [--files N] [--records N] [--only KIND ..] [--sanitize]`: the long form, as `make fuzz` runs it.

Prints one line a kind: attempts, how many were taken and refused, and every attempt that ended in any other way. Attempt
n of a kind is the same everywhere: `--first n --files 1 --only KIND` repeats it.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Seconds an attempt may take, and bytes that it may ask for beside what the process has.
_SECONDS, _BYTES = 20, 8 << 30


def kinds() -> dict[str, Callable[[Path], Any]]:
    """Kind -> what makes its attempts in a folder of its own."""
    from tests.fuzz.images import FORMATS, Pictures
    from tests.fuzz.records import Databases, LabelLists
    from tests.fuzz.states import Checkpoints, Configurations, Encoders, Recognisers

    pictures = {name.lower(): (lambda folder, name=name: Pictures(name)) for name in FORMATS}
    return {
        "lmdb": Databases,
        **pictures,
        "checkpoint": Checkpoints,
        "encoder": Encoders,
        "recogniser": Recognisers,
        "yaml": Configurations,
        "labels.tsv": LabelLists,
    }


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """While entered, memory is limited; in the main thread an attempt is too (`signal.alarm`)."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {_SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def attack(kind: str, folder: Path, numbers: range) -> tuple[Counter[str], list[str]]:
    """Attempts of a kind; how they ended, and the tracebacks of those that ended neither taken nor refused."""
    made, ends, failures = kinds()[kind](folder), Counter[str](), []
    with limits():
        for number in numbers:
            signal.alarm(_SECONDS)
            try:
                ends[made.attempt(random.Random(f"{kind} {number}"))] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                ends["failed"] += 1
                failures.append(f"{kind} {number}: {''.join(traceback.format_exception(error)[-6:])}")
            finally:
                signal.alarm(0)
    return ends, failures


def sanitized(records: int) -> str:
    """The records with a compiled reader that is built with address and undefined-behaviour sanitizers; their counts."""
    build = ROOT / "build" / "fuzz"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
    import pybind11

    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DRCMSTR_FAST_CUDA=0",
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DRCMSTR_FAST_OUTPUT={build}/rcmstr_fast",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(build)], check=True, stdout=subprocess.DEVNULL)
    (module,) = (build / "rcmstr_fast").glob("_C*.so")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    code = (
        f"import importlib.util as u, sys; s = u.spec_from_file_location('rcmstr_fast._C', {str(module)!r});"
        "import rcmstr_fast; rcmstr_fast._C = sys.modules['rcmstr_fast._C'] = m = u.module_from_spec(s);"
        "s.loader.exec_module(m); from tests.fuzz.records import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {
        "LD_PRELOAD": " ".join(text.strip() for text in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(records)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        return f"FAILED with status {done.returncode}\n{done.stderr[-6000:]}"
    counted = json.loads(done.stdout)
    return f"{sum(counted['records'].values())} records of {sum(counted['files'].values())} files: {counted}"


def main() -> int:
    """The long form; status 1 where an attempt failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000, help="attempts a kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    parser.add_argument("--records", type=int, default=100_000, help="LMDB records read with sanitizers; 0: none")
    parser.add_argument("--only", nargs="*", choices=list(kinds()), help="these kinds; default: all")
    arguments = parser.parse_args()
    bad = 0
    logging.disable(logging.CRITICAL)
    if arguments.records and not arguments.only:
        told = sanitized(arguments.records)
        bad += told.startswith("FAILED")
        print(f"lmdb with sanitizers: {told}", flush=True)
    for kind in arguments.only or kinds():
        with tempfile.TemporaryDirectory() as folder:
            ends, failures = attack(kind, Path(folder), range(arguments.first, arguments.first + arguments.files))
        bad += bool(failures)
        print(f"{kind}: {arguments.files} attempts: {dict(ends)}", *failures[:20], sep="\n", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
