"""The small kernels on layouts and sizes beyond those of tests/ops, against float64."""

import pytest
import torch

from rcmstr_fast import ops
from tests.kernels.rows import DEVICE, TRITON, relative

pytestmark = TRITON
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def order_of(batch, strips, group):
    index = torch.arange(batch, device=DEVICE)
    return ops.draw_order(index, seed=1, epoch=0, num_patches=strips, group_size=group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, frames, channels, subwords, strips", [(4, 26, 70, 4, 2), (1, 1, 3, 1, 0), (3, 33, 130, 5, 3)]
)
def test_pooling_and_its_gradient(dtype, batch, frames, channels, subwords, strips):
    values = torch.randn(batch, frames, channels, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    order = order_of(batch, strips, 2) if strips else None
    results = []
    for backend, cast in (("reference", torch.float64), ("triton", dtype)):
        leaf = values.to(cast).detach().requires_grad_()
        levels = ops.hierarchical_pool(leaf, subwords, order=order, backend=backend)
        loss = sum((level.double() * (i + 1)).sin().sum() for i, level in enumerate(levels))
        results.append((*levels, torch.autograd.grad(loss, leaf)[0]))
    for expected, found in zip(*results):
        assert found.dtype == dtype
        assert relative(found, expected) < 4 * torch.finfo(dtype).eps


def test_only_one_level_needs_a_gradient():
    leaf = torch.randn(2, 8, 5, device=DEVICE, requires_grad=True)
    ops.hierarchical_pool(leaf, 2, order=order_of(2, 2, 2), backend="triton").word.sum().backward()
    assert torch.allclose(leaf.grad, torch.full_like(leaf, 1 / 8))


def test_nan_in_one_frame_stays_in_its_windows():
    frames = torch.randn(1, 26, 4, device=DEVICE)
    frames[0, 25] = torch.nan
    levels = ops.hierarchical_pool(frames, 4, backend="triton")
    assert levels.word.isnan().all() and levels.subword[0].isnan().any(dim=1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masked_mse_in_any_layout(dtype, layout):
    generator = torch.Generator().manual_seed(4)
    prediction, target = torch.randn(2, 3, 3, 20, 30, generator=generator).to(DEVICE, dtype)
    mask = (torch.rand(3, 1, 20, 30, generator=generator) < 0.6).to(DEVICE)
    prediction[~mask.expand_as(prediction)] = torch.nan
    prediction = prediction.contiguous(memory_format=layout)
    results = []
    for backend, cast in (("reference", torch.float64), ("triton", dtype)):
        leaf = prediction.to(cast).detach().requires_grad_()
        loss = ops.masked_mse(leaf, target.to(cast), mask, backend=backend)
        (2 * loss).backward()
        results.append((loss.detach(), leaf.grad))
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=1e-5)
    assert relative(results[1][1], results[0][1]) < 2 * torch.finfo(dtype).eps
    assert results[1][1].is_contiguous(memory_format=layout)


def test_masked_mse_of_nothing_hidden_is_zero_with_zero_gradient():
    leaf = torch.full((2, 3, 4, 5), torch.nan, device=DEVICE, requires_grad=True)
    loss = ops.masked_mse(
        leaf, torch.zeros_like(leaf), torch.zeros(2, 1, 4, 5, dtype=torch.bool, device=DEVICE), backend="triton"
    )
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


@pytest.mark.parametrize("count", [0, 1, 17, 70, 71, 200])
def test_enqueue_wraps_casts_and_advances(count):
    keys = torch.randn(count, 33, device=DEVICE)
    results = []
    for backend in ("reference", "triton"):
        queue, pointer = torch.zeros(70, 33, device=DEVICE, dtype=torch.float16), torch.tensor(65, device=DEVICE)
        ops.enqueue_(queue, pointer, keys.T.contiguous().T, backend=backend)
        results.append((queue, int(pointer)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
