"""From partial sums to losses and gradient coefficients a row, and from partial gradients to gradients.

With Z_+ = Z_info + e^{q.p / tau_info}:
  info = log(Z_+) - q.p / tau_info,   kl = (D_p / Z_p - D_q / Z_q) / (2 tau_kl),
  c1 = 1 / (Z_+ tau_info),  c2 = alpha (1 + (D_q / Z_q) / tau_kl) / (2 tau_kl Z_q),
  c3 = alpha / (2 tau_kl^2 Z_q),  c4 = alpha / (2 tau_kl Z_p),  c5 = (Z_info / Z_+) / tau_info,
  gradient = sum_k w_k n_k - c5 p.
Parts are added in a fixed order. The weights w become fp16, so c1..c4 of a row carry a factor c6: the power of two that
brings its largest possible |w| just below 2^15 (fp16 ends at 2^16), with the sign of alpha, so that c4 is never
negative. With J = KL(P||Q) + KL(Q||P) = 2 kl and y = log(P / Q) every term of J = sum (P - Q) y is positive, hence at
most J, which bounds |w| by c5 + alpha / (2 tau_kl) (3.5 sqrt(J) + 4 J); docs/ops/relational_loss.md has the steps.
"""

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    """log(1 + x) to fp32 accuracy also for small x."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def _weight_scale(c5, kl, alpha, tau_kl):
    """The power of two c6, with the sign of alpha.

    Where P = Q, rounding can leave kl a little below zero, and more so with many keys far from zero: it counts as zero,
    since the root of a negative number would spoil the gradient of the row. 1e-5 covers what rounding adds near zero,
    where the bound would vanish.
    """
    j = tl.maximum(2.0 * kl, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-5
    bound = c5 + tl.abs(alpha) / (2.0 * tau_kl) * (3.5 * tl.sqrt(j) + 4.0 * j)
    scale = tl.exp2(tl.floor(tl.log2(32768.0 / (bound + 1e-30))))
    return tl.where(alpha < 0.0, -scale, scale)


@triton.jit
def _row_terms_kernel(
    query_ptr,
    key_ptr,
    partials_ptr,
    infos_ptr,
    kls_ptr,
    coefficients_ptr,
    M,
    parts,
    part_stride,
    tau_info,
    tau_kl,
    alpha,
    D: tl.constexpr,
    INFO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Losses and coefficients of one query's rows (grid: row tiles); rows of any float dtype, arithmetic in fp32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    z_info = tl.zeros([BLOCK_M], tl.float32)
    z_q, d_q, z_p, d_p = z_info, z_info, z_info, z_info
    rows = partials_ptr + offs_m
    for _ in range(parts):
        z_info += tl.load(rows, mask=inside, other=0.0)
        z_q += tl.load(rows + M, mask=inside, other=0.0)
        d_q += tl.load(rows + 2 * M, mask=inside, other=0.0)
        z_p += tl.load(rows + 3 * M, mask=inside, other=0.0)
        d_p += tl.load(rows + 4 * M, mask=inside, other=0.0)
        rows += part_stride
    mean_q = d_q / z_q
    kl = (d_p / z_p - mean_q) / (2.0 * tau_kl)
    tl.store(kls_ptr + offs_m, kl, mask=inside)
    out = coefficients_ptr + offs_m
    c5 = tl.zeros([BLOCK_M], tl.float32)
    if INFO:
        offsets = offs_m.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
        query = tl.load(query_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
        key = tl.load(key_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
        mass = tl.exp(tl.sum(query * key, axis=1) / tau_info)
        total = z_info + mass
        tl.store(infos_ptr + offs_m, _log1p(z_info / mass), mask=inside)
        c5 = z_info / total / tau_info
        c6 = _weight_scale(c5, kl, alpha, tau_kl)
        tl.store(out, c6 / (total * tau_info), mask=inside)
    else:
        c6 = _weight_scale(c5, kl, alpha, tau_kl)
    half = c6 * alpha / (2.0 * tau_kl)
    tl.store(out + M, half * (1.0 + mean_q / tau_kl) / z_q, mask=inside)
    tl.store(out + 2 * M, half / tau_kl / z_q, mask=inside)
    tl.store(out + 3 * M, half / z_p, mask=inside)
    tl.store(out + 4 * M, c5, mask=inside)
    tl.store(out + 5 * M, c6, mask=inside)


@triton.jit
def _reduce_kernel(
    partials_ptr,
    coefficients_ptr,
    key_ptr,
    grad_ptr,
    M,
    parts,
    part_stride,
    share,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """grad = share (sum of parts / c6 - c5 key) (grid: row tiles). Reads 4 S M D bytes."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    offsets = offs_m.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    total = tl.zeros([BLOCK_M, D], tl.float32)
    part = partials_ptr
    for _ in range(parts):
        total += tl.load(part + offsets, mask=inside[:, None], other=0.0)
        part += part_stride
    c5 = tl.load(coefficients_ptr + 4 * M + offs_m, mask=inside, other=0.0)[:, None]
    c6 = tl.load(coefficients_ptr + 5 * M + offs_m, mask=inside, other=1.0)[:, None]
    key = tl.load(key_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(grad_ptr + offsets, share * (total / c6 - c5 * key), mask=inside[:, None])


@triton.jit
def _gather_kernel(
    partials_ptr, coefficients_ptr, order_ptr, starts_ptr, grad_ptr, M, parts, part_stride, share, D: tl.constexpr
):
    """grad of a query row = share * sum over its pairs / c6, in the order of pairs and parts (grid: query rows)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        pair = tl.load(order_ptr + i)
        part = partials_ptr + pair * D + offs_d
        one = tl.zeros([D], tl.float32)
        for _ in range(parts):
            one += tl.load(part)
            part += part_stride
        total += one / tl.load(coefficients_ptr + 5 * M + pair)
    tl.store(grad_ptr + row * D + offs_d, total * share)
