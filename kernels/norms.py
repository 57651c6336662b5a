"""Parts that the kernels of the dense and of the masked batch norm share; arithmetic is fp32.

A map is a matrix of rows (sites) and columns (channels). A program works on blocks of rows and one block of channels
`c`. `at` are the offsets of its values, and `mask` says which of them exist.
"""

import triton
import triton.language as tl


@triton.jit
def channels(values_ptr, first, c, C):
    """Values of the channels c from offset `first` on; 0 behind the last channel."""
    return tl.load(values_ptr + first + c, mask=c < C, other=0.0)


@triton.jit
def combine(count, mean, m2, other_count, other_mean, other_m2):
    """Counts, means and squared deviations of two sets together (Chan): there is no E[x^2] - E[x]^2 that cancels."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def add_block(count, mean, m2, x, live, mask):
    """Statistics of the rows so far and of a block x of which the rows `live` count."""
    here = tl.sum(live.to(tl.float32), axis=0)
    average = tl.sum(x, axis=0) / tl.maximum(here, 1.0)
    centred = tl.where(mask, x - average[None, :], 0.0)
    return combine(count, mean, m2, here, average, tl.sum(centred * centred, axis=0))


@triton.jit
def apply(x_ptr, residual_ptr, out_ptr, at, mask, mean, scale, shift, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """Write (x - mean) scale + shift (+ residual) (ReLU)."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gradient(grad_x_ptr, at, mask, d, normal, scale, average, moment):
    """Write weight rstd (d - mean(d) - normal mean(d normal)), the gradient in x; scale is weight rstd."""
    gradient = scale[None, :] * (d - average[None, :] - normal * moment[None, :])
    tl.store(grad_x_ptr + at, gradient.to(grad_x_ptr.dtype.element_ty), mask=mask)
