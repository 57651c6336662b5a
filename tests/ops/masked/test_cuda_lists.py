"""csrc/sites.cu itself, run on the CPU: its blocks one after the other, a thread for each of CUDA's; csrc/sites.cpp."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rcmstr_fast.ops.masked.layers import Window
from rcmstr_fast.ops.masked.lists import sorted_rows, tap_pairs, tap_words

ROOT = Path(__file__).resolve().parents[3]
ENTRY = """
extern "C" void lists(const bool* active, const bool* partner, const int* w, bool inverse, int32_t* positions,
                      int32_t* words, int32_t* counts, int32_t* slots, int64_t images, bool on_host) {
  const rcmstr::Window window{w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]};
  const rcmstr::SiteJob job{active, partner, window, inverse, positions, words, counts, slots};
  on_host ? rcmstr::list_jobs(&job, 1, images) : rcmstr::list_jobs_cuda(&job, 1, images, nullptr);
}
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is on the path")
    source = (ROOT / "csrc" / "sites.cu").read_text(encoding="utf-8")
    source, launches = re.subn(r"(\w+)<<<([^>]*)>>>\(", r"on_host(\2)(\1, ", source)
    source, counts = re.subn(r"SCAN_THREADS = \d+", "SCAN_THREADS = 64", source)
    assert (launches, counts) == (3, 1)
    folder = tmp_path_factory.mktemp("sites")
    (folder / "sites.cpp").write_text(source + ENTRY)
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-pthread", "-I", str(ROOT / "tests/ops/cuda_on_host")]
    sources = [str(folder / "sites.cpp"), str(ROOT / "csrc" / "sites.cpp")]
    command += ["-I", str(ROOT / "csrc"), *sources, "-o", str(folder / "sites.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "sites.so"))


def listed(cuda, host, mine, partner, shape, inverse, taps, pairs):
    """Positions, words (None of pairs) and counts."""
    images, sites = mine.shape[0], mine.numel()
    positions = torch.full((2, taps, sites) if pairs else (sites,), -7, dtype=torch.int32)
    words = None if pairs else torch.full((sites,), -7, dtype=torch.int32)
    counts = torch.zeros(taps if pairs else 1, dtype=torch.int32)
    slots = torch.zeros(((taps if pairs else 1 << taps) + 1) * images, dtype=torch.int32)
    at = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (mine, partner, positions, words, counts, slots)]
    window = (ctypes.c_int * 10)(*shape)
    cuda.lists(at[0], at[1], window, inverse, *at[2:], ctypes.c_int64(images), host)
    return positions, words, counts


@pytest.mark.parametrize("host", [False, True], ids=["cuda", "host"])
@pytest.mark.parametrize(
    ("images", "size", "source_size", "window"),
    [
        (5, (4, 7), (4, 7), Window((3, 3), (1, 1), (1, 1))),
        (3, (2, 8), (4, 7), Window((2, 2), (2, 1), (0, 1))),
        (1, (3, 3), (3, 3), Window((1, 1), (1, 1), (0, 0))),
    ],
    ids=str,
)
def test_lists_are_those_of_plain_pytorch(cuda, host, images, size, source_size, window):
    draw = torch.Generator().manual_seed(images)
    active, source = (torch.rand(images, 1, *s, generator=draw) < 0.6 for s in (size, source_size))
    words, reached = tap_words(source, active, window)
    shape = (*source_size, *size, *window.numbers)
    for mine, partner, inverse, expected_words in ((active, source, False, words), (source, active, True, reached)):
        positions, bits, number = sorted_rows(mine, expected_words, window.taps)
        found = listed(cuda, host, mine, partner, shape, inverse, window.taps, pairs=False)
        n = int(number)
        assert torch.equal(found[2], number)
        assert torch.equal(found[0][:n], positions[:n]) and torch.equal(found[1][:n], bits[:n])
        assert bool((found[0][n:] == -7).all())
    pairs, counts = tap_pairs(words, window, source_size)
    found = listed(cuda, host, active, source, shape, False, window.taps, pairs=True)
    assert torch.equal(found[2], counts)
    for tap, n in enumerate(counts.tolist()):
        assert torch.equal(found[0][:, tap, :n], pairs[:, tap, :n])
