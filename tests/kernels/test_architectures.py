"""Which GPU takes which tiles, and which one is refused: answered without a GPU."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rcmstr_fast.kernels import architectures, runtime
from rcmstr_fast.kernels.architectures import KNOWN, family, refusal
from rcmstr_fast.kernels.masked import tiles as masked_tiles
from rcmstr_fast.ops import native, triton_backend

KIB = 1024


@pytest.mark.parametrize(
    ("capability", "shared", "expected"),
    [
        ((8, 0), 163, 80),  # A100
        ((8, 6), 99, 86),  # A10, RTX 30
        ((8, 7), 163, 80),  # Orin
        ((8, 9), 99, 86),  # L4, RTX 40
        ((9, 0), 227, 90),  # H100, H200
        ((10, 0), 227, 100),  # B200
        ((10, 3), 227, 100),  # B300
        ((12, 0), 99, 86),  # RTX 50
        ((12, 1), 99, 86),
        ((9, 0), 163, 86),  # less than a Hopper has: the tiles that fit anywhere
        ((13, 0), 227, 86),  # unknown: likewise
    ],
)
def test_tiles_follow_instructions_and_shared_memory(capability, shared, expected):
    assert family(capability, shared * KIB) == expected
    assert refusal(capability, shared * KIB) == ""


@pytest.mark.parametrize(
    ("capability", "shared", "says"),
    [
        ((7, 5), 64, "capability 8.0 or more, got 7.5 .*no bf16"),
        ((6, 1), 48, "got 6.1 .*no tensor cores"),
        ((8, 6), 48, "needs 99 KiB of shared memory.*gives 48 KiB"),
    ],
)
def test_a_gpu_without_the_means_is_refused_with_a_reason(monkeypatch, capability, shared, says):
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared * KIB)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    (reason,) = triton_backend.reasons()
    assert re.search(says, reason)


def test_a_launcher_asks_for_the_device_at_hand(monkeypatch):
    """An RTX 4090 must not take an A100's tiles, as it does where only the major version is read."""
    properties = SimpleNamespace(major=8, minor=9, shared_memory_per_block_optin=99 * KIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    runtime._family.cache_clear()
    assert runtime.architecture(torch.device("cuda", 0)) == 86
    runtime._family.cache_clear()
    assert runtime.architecture(torch.device("cpu")) == 80


def test_every_known_architecture_has_tiles_of_its_family():
    for one in KNOWN.values():
        assert one.family in architectures.FAMILIES
        for channels in (3, 32, 64, 128, 256, 512):
            tile = masked_tiles.tile(one.family, channels, channels, 2)
            operands = 2 * (tile.block_m + tile.block_n) * tile.block_k * max(1, tile.num_stages - 1)
            assert operands <= one.shared, (one.number, channels)


@pytest.mark.parametrize("refused", ["", "no kernel image is available for execution on the device"])
def test_cuda_code_that_cannot_run_is_a_reason_and_not_a_crash(monkeypatch, refused):
    extension = SimpleNamespace(cuda=True, cuda_refusal=lambda: refused)
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    native._cuda_refusal.cache_clear()
    found = native.cuda_reasons(torch.device("cuda", 0))
    native._cuda_refusal.cache_clear()
    assert found == ([f"the CUDA code of rcmstr_fast._C cannot run on this GPU: {refused}"] if refused else [])
