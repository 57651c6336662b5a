"""csrc/augment.cu itself, run on the CPU: its blocks one after the other, with a thread for each of CUDA's."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rcmstr_fast import ops, random
from rcmstr_fast.ops.augment_views import OPERATIONS, PRESETS, compiled, parameters, presets, reference
from rcmstr_fast.ops.reference import permute_strips

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "augment.cu"
GREY = 2 / 255
SIZE = (12, 40)

ENTRY = """
extern "C" void draw(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
                     uint32_t first, const rcmstr::Preset* preset) {
  rcmstr::draw_parameters_cuda(index, rows, views, batch, seed, epoch, first, *preset, nullptr);
}
extern "C" void apply(const uint8_t* images, const float* rows, void* out, int64_t views, int64_t batch, int height,
                      int width, bool bfloat16, const int64_t* places, int patches) {
  rcmstr::apply_parameters_cuda(images, rows, out, {views, batch, height, width}, {bfloat16, places, patches}, nullptr);
}
"""


def as_cpp(source: str, threads: int) -> str:
    """The CUDA source in the words of cuda_on_host, with fewer threads a block."""
    source, launches = re.subn(r"([\w<>]+?)<<<([^>]*)>>>\(", r"on_host(\2)(\1, ", source)
    source, shared = re.subn(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = dynamic_shared<\1>();", source)
    source, counts = re.subn(r"THREADS = \d+;", f"THREADS = {threads};", source)
    assert (launches, shared, counts) == (2, 1, 1)
    return source + ENTRY


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is on the path")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "augment.cpp").write_text(as_cpp(SOURCE.read_text(encoding="utf-8"), threads=64))
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-I", str(HERE / "cuda_on_host")]
    command += ["-I", str(SOURCE.parent), str(folder / "augment.cpp"), "-o", str(folder / "augment.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "augment.so"))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def draw(cuda: ctypes.CDLL, index: torch.Tensor, views: int, preset: presets.AugmentPreset) -> torch.Tensor:
    rows = torch.full((views, len(index), parameters.ROW), torch.nan)
    numbers = [ctypes.c_int64(views), ctypes.c_int64(len(index)), ctypes.c_uint64(7), ctypes.c_uint32(3)]
    table = parameters.table(preset)
    cuda.draw(pointer(index), pointer(rows), *numbers, ctypes.c_uint32(random.AUGMENT), pointer(table))
    return rows


def apply(cuda, images, rows, order=None, dtype=torch.float32) -> torch.Tensor:
    places, patches = (None, 0) if order is None else (compiled.places(order), order.shape[1])
    made = torch.full((len(rows) + (order is not None), *images.shape), torch.nan, dtype=dtype)
    counts = [ctypes.c_int64(len(rows)), ctypes.c_int64(len(images)), *images.shape[1:3], dtype == torch.bfloat16]
    cuda.apply(pointer(images), pointer(rows), pointer(made), *counts, pointer(places), patches)
    return made.permute(0, 1, 4, 2, 3)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_reference_s(cuda, name):
    index = torch.tensor([0, 5, (1 << 48) - 1])
    for preset in set(presets.views_of(name, 2)):
        expected = [parameters.draw_parameters(index, seed=7, epoch=3, view=view, preset=preset) for view in range(2)]
        torch.testing.assert_close(draw(cuda, index, 2, preset), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_views_and_the_permuted_one_are_the_reference_s(cuda, images):
    index = torch.arange(len(images)) + 40
    order = ops.draw_order(index, seed=7, epoch=3, num_patches=2, group_size=2)
    rows = draw(cuda, index, 2, presets.AugmentPreset())
    made = apply(cuda, images, rows, order)
    assert (made[:2] - reference.apply_parameters(images, rows)).abs().max() < GREY / 2
    assert torch.equal(made[2], permute_strips(made[0], order, num_patches=2, group_size=2))
    rounded = apply(cuda, images, rows, order, torch.bfloat16)
    assert torch.equal(rounded, made.bfloat16())


@pytest.mark.parametrize("name", ["simclr", "dig", "ibot"])
def test_views_of_the_other_presets(cuda, images, name):
    index = torch.arange(len(images)) + 40
    for preset in presets.views_of(name, 2):
        rows = draw(cuda, index, 1, preset)
        assert (apply(cuda, images, rows) - reference.apply_parameters(images, rows)).abs().max() < GREY / 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_alone(cuda, images, name):
    rows = parameters.draw_parameters(torch.arange(len(images)), seed=1, epoch=0, view=0)
    rows = parameters.only(rows, name)[None]
    assert (apply(cuda, images, rows) - reference.apply_parameters(images, rows)).abs().max() < GREY / 2
