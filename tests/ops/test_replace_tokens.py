"""replace_tokens: values, both gradients, what stays out of them, and the operator as PyTorch sees it."""

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.ops.replace_tokens.triton import _replace
from tests.kernels.rows import DEVICE, TRITON, relative
from tests.ops.cases import cases, normal

all_cases = cases("replace_tokens")


def inputs(device, dtype=torch.float32, batch=3, number=37, channels=70, share=0.6):
    """Tokens in the layout of a contiguous convolution (channels far apart), mask token, positions, hidden."""
    tokens = normal(batch, channels, number, seed=1).to(device, dtype).transpose(1, 2)
    others = (normal(channels, seed=2).to(device), normal(number, channels, seed=3).to(device))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.rand(batch, number, generator=torch.Generator().manual_seed(0)).to(device) < share
    return tokens, *(t.to(wide) for t in others), hidden


def gradients(case, tokens, mask_token, position, hidden):
    """Result, gradients of tokens and mask token."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (tokens, mask_token)]
    position = position.detach().requires_grad_()
    out = case(ops.replace_tokens, leaves[0], leaves[1], position, hidden)
    (out.double().sin() * torch.arange(out.shape[2], device=out.device)).sum().backward()
    assert position.grad is None
    return out.detach(), *(leaf.grad for leaf in leaves)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 70), (1, 1, 1), (2, 65, 64), (0, 4, 5)], ids=str)
def test_values_and_gradients_against_float64(case, dtype, shape):
    tokens, mask_token, position, hidden = inputs(case.device, dtype, *shape)
    found = gradients(case, tokens, mask_token, position, hidden)
    tokens, mask_token, position = (t.double() for t in (tokens, mask_token, position))
    out = torch.where(hidden[:, :, None], mask_token, tokens) + position
    slope = out.cos() * torch.arange(shape[2], device=out.device)
    expected = out, slope.masked_fill(hidden[:, :, None], 0), slope[hidden].sum(0)
    assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
    for got, want, limit in zip(found, expected, (1e-6, max(1e-6, torch.finfo(dtype).eps), 2e-6)):
        assert got.shape == want.shape
        assert want.norm() == 0 or relative(got, want) < limit
    assert not found[1][hidden].any()


@all_cases
def test_nan_in_hidden_tokens_reaches_nothing_and_repeats_are_bitwise(case):
    tokens, *others, hidden = inputs(case.device)
    clean = gradients(case, tokens, *others, hidden)
    dirty = gradients(case, tokens.masked_fill(hidden[:, :, None], torch.nan), *others, hidden)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@all_cases
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_visible_and_all_hidden(case, share):
    tokens, mask_token, position, hidden = inputs(case.device, share=share)
    out, grad_tokens, grad_mask_token = gradients(case, tokens, mask_token, position, hidden)
    assert torch.equal(out, ((mask_token if share else tokens) + position).expand_as(out))
    assert bool(grad_tokens.any()) == (share == 0) and bool(grad_mask_token.any()) == (share == 1)


@TRITON
def test_the_operator_and_compile():
    tokens, mask_token, position, hidden = inputs(DEVICE, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (tokens, mask_token)]
    torch.library.opcheck(_replace, (*leaves, position, hidden))

    def step(tokens, mask_token):
        with torch.autocast(DEVICE, torch.bfloat16):
            return ops.replace_tokens(tokens, mask_token, position, hidden, backend="triton").square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.zeros(2, 4)}, ValueError, "tokens must be [B, N, C], got [2, 4]"),
        ({"mask_token": torch.zeros(4)}, ValueError, "mask_token must be [6] like tokens, got [4]"),
        ({"position": torch.zeros(1, 5, 6)}, ValueError, "position must be [5, 6] like tokens, got [1, 5, 6]"),
        ({"hidden": torch.zeros(2, 5)}, TypeError, "hidden must be a bool tensor [2, 5], got torch.float32"),
        (
            {"hidden": torch.zeros(2, 5, device="meta").bool()},
            ValueError,
            "hidden must be on cpu like tokens, got meta",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {
        "tokens": torch.zeros(2, 5, 6),
        "mask_token": torch.zeros(6),
        "position": torch.zeros(5, 6),
        "hidden": torch.zeros(2, 5, dtype=torch.bool),
    }
    with pytest.raises(error) as caught:
        ops.replace_tokens(**(arguments | changes))
    assert str(caught.value) == f"replace_tokens: {message}"
