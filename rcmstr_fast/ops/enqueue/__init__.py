"""Ring-buffer queue of keys."""

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.enqueue import reference, triton

_enqueue_ = operation("enqueue_", reference.enqueue_)
register_triton(_enqueue_, triton.enqueue_, triton.reasons)
_NAME = "enqueue_"


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, backend: str | None = None) -> None:
    """Write keys into a ring buffer in place, without host synchronisation.

    Key i goes to row (pointer + i) % K, then pointer becomes (pointer + n) % K; of more than K keys the last K stay.

    Args:
        queue: [K, D] floating point, K >= 1; overwritten.
        pointer: 0-d int64 on the device of the queue, in [0, K); the next row to write, advanced in place.
        keys: [n, D] floating point; cast to the dtype of the queue. n may be 0.
        backend: None (automatic), "reference" or "triton".
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, K is 0.
    """
    checks.check_tensor(_NAME, "queue", queue, ("K", "D"))
    checks.check_not_empty(_NAME, "queue", queue, "K")
    checks.check_tensor(_NAME, "pointer", pointer, (), "int64")
    checks.check_tensor(_NAME, "keys", keys, ("n", queue.shape[1]), like="queue")
    checks.check_devices(_NAME, queue=queue, pointer=pointer, keys=keys)
    if env.debug():
        checks.check_range(_NAME, "pointer", pointer, queue.shape[0])
        checks.check_finite(_NAME, "keys", keys)
    _enqueue_(queue, pointer, keys, backend=backend)
