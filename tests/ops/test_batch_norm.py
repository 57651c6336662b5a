"""Batch norm over groups, every backend: values, gradients and statistics against torch's own layer in float64."""

import pytest
import torch
import torch.nn.functional as F

from rcmstr_fast import ops
from rcmstr_fast.ops.batch_norm import cpu, group_sizes
from rcmstr_fast.ops.dispatch import availability

BACKENDS = ["reference", "cpp", "triton"]
MAP, ROWS, TOKENS = (6, 70, 3, 5), (6, 5), (6, 4, 5)
DIVISIONS = [(1, 0), (2, 0), (2, 2), (3, 2), (1, 4), (1, 5)]


def usable(backend):
    reasons = availability()["grouped_batch_norm"][backend]
    if reasons:
        pytest.skip(f"{backend}: {reasons[0]}")


def operands(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    x, residual, weights = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    x = (3 + 2 * x).to(dtype)
    weight, bias = torch.randn(2, channels)
    if len(shape) == 4:
        x, residual = (y.contiguous(memory_format=torch.channels_last) for y in (x, residual))
    return x, residual.to(dtype), weight, bias, weights.to(dtype)


def oracle(x, weight, bias, passes, group_size, residual, relu):
    """torch's functional on every group, in float64."""
    sizes = group_sizes(len(x) // passes, group_size) * passes
    outputs, means, variances = [], [], []
    for part in x.split(sizes):
        rows = part.movedim(1, -1).reshape(-1, x.shape[1]) if x.dim() == 4 else part.reshape(-1, x.shape[-1])
        y = F.batch_norm(rows, None, None, weight, bias, True, 0.0, 1e-5)
        shape = part.movedim(1, -1).shape if x.dim() == 4 else part.shape
        outputs.append(y.view(shape).movedim(-1, 1) if x.dim() == 4 else y.view(shape))
        means.append(rows.mean(0))
        variances.append(rows.var(0))
    out = torch.cat(outputs)
    out = out if residual is None else out + residual
    return (out.relu() if relu else out), torch.stack(means), torch.stack(variances)


def run(function, x, weight, bias, residual, weights):
    """Results and gradients of x, weight, bias, residual."""
    leaves = [y.detach().clone().requires_grad_() for y in (x, weight, bias, *([] if residual is None else [residual]))]
    out, mean, var = function(*leaves)
    gradients = torch.autograd.grad((out * weights).sum(), leaves)
    return [out.detach(), mean, var, *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [MAP, ROWS, TOKENS], ids=str)
@pytest.mark.parametrize(("passes", "group_size"), DIVISIONS)
@pytest.mark.parametrize(("added", "relu"), [(False, False), (True, True), (False, True)])
def test_against_torch(backend, shape, passes, group_size, added, relu):
    usable(backend)
    x, residual, weight, bias, weights = operands(shape)
    residual = residual if added else None

    def ours(x, weight, bias, residual=None):
        return ops.grouped_batch_norm(
            x, weight, bias, passes=passes, group_size=group_size, residual=residual, relu=relu, backend=backend
        )

    def theirs(x, weight, bias, residual=None):
        return oracle(x, weight, bias, passes, group_size, residual, relu)

    got = run(ours, x, weight, bias, residual, weights)
    wide = [None if y is None else y.double() for y in (x, weight, bias, residual, weights)]
    names = ("out", "mean", "var", "grad_x", "grad_weight", "grad_bias", "grad_residual")
    for name, mine, expected in zip(names, got, run(theirs, *wide), strict=False):
        torch.testing.assert_close(mine.double(), expected, rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_many_rows_are_added_in_parts(backend):
    usable(backend)
    x, _, weight, bias, weights = operands((4, 3, 40, 33))
    x = x + 1000  # cancellation shows in E[x^2] - E[x]^2
    got = run(lambda *a: ops.grouped_batch_norm(*a, passes=2, backend=backend), x, weight, bias, None, weights)
    expected = run(
        lambda *a: oracle(*a, 2, 0, None, False), *(y.double() for y in (x, weight, bias)), None, weights.double()
    )
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_keep_their_type(backend, dtype):
    usable(backend)
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("cpp: float16 is for GPUs")
    x, residual, weight, bias, _ = operands(MAP, dtype)
    made = ops.grouped_batch_norm(x, weight, bias, passes=2, residual=residual, relu=True, backend=backend)
    expected = oracle(*(y.double() for y in (x, weight, bias)), 2, 0, residual.double(), True)
    assert made.out.dtype == dtype and made.mean.dtype == torch.float32
    torch.testing.assert_close(made.out.double(), expected[0], rtol=4e-2, atol=6e-2)
    torch.testing.assert_close(made.var.double(), expected[2], rtol=2e-2, atol=2e-2)


def test_layout_stays_and_repeats_are_exact():
    x, _, weight, bias, _ = operands(MAP)
    for backend in BACKENDS:
        if not availability()["grouped_batch_norm"][backend]:
            first, again = (ops.grouped_batch_norm(x, weight, bias, passes=2, backend=backend) for _ in range(2))
            assert first.out.is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"passes": 4}, r"multiple of 4 passes, got \[6, 70, 3, 5\]"),
        ({"residual": torch.zeros(2, 2)}, "residual"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_errors_say_what_came(change, says):
    x, _, weight, bias, _ = operands(MAP)
    with pytest.raises(ValueError, match=says):
        ops.grouped_batch_norm(x, weight, bias, **change)


def test_automatic_on_a_cpu_takes_rows_where_channels_lie_side_by_side(monkeypatch):
    usable("cpp")
    x, _, weight, bias, _ = operands(MAP)
    ops.grouped_batch_norm(x, weight, bias)  # the first use in a process checks the backend against the reference
    taken = []
    made = cpu.norm_rows
    monkeypatch.setattr(cpu, "norm_rows", lambda *a: taken.append(1) or made(*a))
    ops.grouped_batch_norm(x, weight, bias)
    ops.grouped_batch_norm(x.contiguous(), weight, bias)
    assert taken == [1]


def test_custom_operator_is_well_formed():
    usable("triton")
    x, residual, weight, bias, _ = operands((4, 5, 2, 3))
    leaves = [y.requires_grad_() for y in (x, weight, bias, residual)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.rcmstr_fast.grouped_batch_norm.default
    torch.library.opcheck(operator, (*leaves, 2, 0, 1e-5, True), test_utils=checks)
