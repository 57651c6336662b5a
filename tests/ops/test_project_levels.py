"""Pooling, projection and normalisation of the levels: every backend against float64 autograd."""

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.ops import reference
from tests.kernels.rows import relative
from tests.ops.cases import cases, normal

CASES = cases("project_levels")
LEVELS = ("frame", "subword", "word")


def given(batch, frames, channels, width, strips, levels, *, dtype=torch.float64, device="cpu"):
    x = normal(batch, frames, channels, seed=1, dtype=dtype, device=device)
    weights = {n: normal(width, channels, seed=2 + i, dtype=dtype, device=device) for i, n in enumerate(levels)}
    biases = {n: normal(width, seed=6 + i, dtype=dtype, device=device) for i, n in enumerate(levels)}
    order = None
    if strips:
        index = torch.arange(batch, device=device)
        order = ops.draw_order(index, seed=1, epoch=0, num_patches=strips, group_size=2)
    return x, weights, biases, order


def run(function, x, weights, biases, subwords, order):
    """Rows and the gradients of frames, weights and biases."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights.values(), *biases.values())]
    names = list(weights)
    w, b = dict(zip(names, leaves[1:])), dict(zip(names, leaves[1 + len(names) :]))
    rows = function(leaves[0], w, b, subwords, order=order)
    loss = sum(((i + 1) * normal(*r.shape, seed=20 + i).to(r) * r).sum() for i, r in enumerate(rows.values()))
    return rows, torch.autograd.grad(loss, leaves)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, frames, channels, width, subwords, strips, levels",
    [
        (4, 26, 70, 24, 4, 2, LEVELS),
        (1, 1, 3, 1, 1, 0, LEVELS),
        (3, 33, 130, 128, 5, 3, LEVELS),
        (2, 8, 16, 20, 3, 0, ("subword", "word")),
        (2, 6, 64, 16, 2, 2, ("frame",)),
    ],
)
def test_rows_and_gradients_against_float64(case, dtype, batch, frames, channels, width, subwords, strips, levels):
    if case.backend == "reference" and dtype != torch.float32:
        pytest.skip("plain PyTorch in half precision is the baseline, not a backend under test")
    x, weights, biases, order = given(batch, frames, channels, width, strips, levels)
    x, weights = x.to(dtype).double(), {n: w.to(dtype).double() for n, w in weights.items()}
    expected, wanted = run(reference.project_levels, x, weights, biases, subwords, order)
    cast = [x.to(dtype), {n: w.to(dtype) for n, w in weights.items()}, {n: b.to(dtype) for n, b in biases.items()}]
    cast = [
        t.to(case.device) if isinstance(t, torch.Tensor) else {n: v.to(case.device) for n, v in t.items()} for t in cast
    ]
    at = None if order is None else order.to(case.device)
    rows, found = run(lambda *a, **k: case(ops.project_levels, *a, **k), *cast, subwords, at)
    assert list(rows) == list(levels)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    for level, result in rows.items():
        assert result.dtype == torch.float32 and result.shape == expected[level].shape
        assert relative(result.cpu(), expected[level]) < 4 * eps
        assert torch.allclose(result.norm(dim=1), torch.ones(len(result), device=result.device), atol=1e-5)
    for got, want in zip(found, wanted):
        assert got.dtype == dtype
        scale = float(want.norm()) if width > 1 else 1.0  # a row of one number has norm 1 whatever the number
        assert float((got.double().cpu() - want).norm()) < 12 * eps * scale


@CASES
def test_nan_in_a_frame_reaches_its_windows_only(case):
    x, weights, biases, _ = given(2, 26, 16, 16, 0, LEVELS, dtype=torch.float32, device=case.device)
    x[1, 25, 3] = torch.nan
    rows = case(ops.project_levels, x, weights, biases, 4)
    assert rows["frame"].isnan().all(1).nonzero().flatten().tolist() == [51]
    assert rows["subword"].isnan().all(1).nonzero().flatten().tolist() == [7]
    assert rows["word"].isnan().all(1).tolist() == [False, True]
    assert not rows["frame"][:51].isnan().any()


@CASES
def test_a_row_of_zeros_stays_zero(case):
    x = torch.zeros(1, 4, 16, device=case.device)
    weight, bias = {"word": torch.ones(16, 16, device=case.device)}, {"word": torch.zeros(16, device=case.device)}
    assert not case(ops.project_levels, x, weight, bias, 2)["word"].any()


@CASES
def test_autocast_reaches_the_linear_layer_only(case):
    x, weights, biases, _ = given(2, 6, 32, 16, 0, LEVELS, dtype=torch.float32, device=case.device)
    exact = case(ops.project_levels, x, weights, biases, 2)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        rows = case(ops.project_levels, x, weights, biases, 2)
    for level in LEVELS:
        assert rows[level].dtype == torch.float32
        assert 1e-6 < relative(rows[level], exact[level].double()) < 2e-2


@CASES
def test_equals_pool_linear_normalise_and_repeats_bit_for_bit(case):
    x, weights, biases, order = given(4, 26, 40, 32, 2, LEVELS, dtype=torch.float32, device=case.device)
    one, first = run(lambda *a, **k: case(ops.project_levels, *a, **k), x, weights, biases, 4, order)
    two, second = run(lambda *a, **k: case(ops.project_levels, *a, **k), x, weights, biases, 4, order)
    pooled = ops.hierarchical_pool(x, 4, order=order)
    for level in LEVELS:
        plain = torch.nn.functional.linear(getattr(pooled, level), weights[level], biases[level])
        expected = torch.nn.functional.normalize(plain, dim=-1).flatten(0, 1)
        assert torch.allclose(one[level], expected, atol=1e-5)
        assert torch.equal(one[level], two[level])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@CASES
def test_opcheck_and_compile(case):
    x, weights, biases, order = given(2, 6, 16, 16, 2, LEVELS, dtype=torch.float32, device=case.device)
    leaf = x.requires_grad_()

    def step(frames):
        return sum(r[:, 0].sum() for r in case(ops.project_levels, frames, weights, biases, 2, order=order).values())

    plain = torch.autograd.grad(step(leaf), leaf)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(leaf), leaf)[0]
    assert torch.allclose(plain, compiled, atol=1e-6)
    if case.backend == "triton":
        import importlib

        module = importlib.import_module("rcmstr_fast.ops.project_levels.triton")
        given_ = (leaf, list(weights.values()), list(biases.values()), [0, 1, 2], 2, order)
        torch.library.opcheck(module._project, given_)


def test_bad_arguments_are_named():
    x, weights, biases, _ = given(2, 6, 16, 8, 0, LEVELS, dtype=torch.float32)
    with pytest.raises(ValueError, match="levels out of"):
        ops.project_levels(x, weights, {"word": biases["word"]}, 2)
    with pytest.raises(ValueError, match="levels out of"):
        ops.project_levels(x, {"line": weights["word"]}, {"line": biases["word"]}, 2)
    with pytest.raises(ValueError, match=r"num_subwords must be in 1\.\.6, got 7"):
        ops.project_levels(x, weights, biases, 7)
    with pytest.raises(ValueError, match=r"weights\['word'\] must be \[8, 16\]"):
        ops.project_levels(x, {**weights, "word": weights["word"][:, :3]}, biases, 2)
