"""Ring-buffer write: key i to row (pointer + i) % K, cast to the queue's dtype; the pointer stays on the device."""

import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

#: Elements a program, in at most 16 rows.
BLOCK = 8192


def block_rows(width: int) -> int:
    """Rows a program: wide rows come in fewer, which keeps them in registers."""
    return max(1, min(16, BLOCK // triton.next_power_of_2(width)))


@triton.jit
def _enqueue_kernel(
    queue_ptr,
    pointer_ptr,
    keys_ptr,
    skipped,
    count,
    K,
    key_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Rows skipped .. count - 1 of the keys (grid: blocks of rows). The pointer is read, never written, here."""
    i = skipped + tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = (tl.load(pointer_ptr) + i) % K
    d = tl.arange(0, BLOCK_D)
    mask = (i < count)[:, None] & (d < D)[None, :]
    keys = tl.load(keys_ptr + i[:, None] * key_stride + d[None, :], mask=mask)
    tl.store(queue_ptr + rows[:, None] * D + d[None, :], keys.to(queue_ptr.dtype.element_ty), mask=mask)


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write the keys and advance the pointer, in place, without host synchronisation.

    Args:
        queue: [K, D] contiguous float16, bfloat16 or float32.
        pointer: 0-d int64 on the same device.
        keys: [n, D]; of more than K the last K stay.
    """
    size, width = queue.shape
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    count, rows = keys.shape[0], block_rows(width)
    skipped = max(0, count - size)
    if count:
        with runtime.on_device(queue.device):
            _enqueue_kernel[(triton.cdiv(count - skipped, rows),)](
                queue,
                pointer,
                keys,
                skipped,
                count,
                size,
                keys.stride(0),
                D=width,
                BLOCK_D=triton.next_power_of_2(width),
                BLOCK_ROWS=rows,
            )
    pointer.add_(count).remainder_(size)
