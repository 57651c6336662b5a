"""A CUDA graph's stand-in on the CPU: records the tensor operations of a step and repeats them on the same memory.

What Python decides while recording is frozen, as in a graph: numbers, branches, which tensors are read and written.
Reading a tensor's value from Python while recording is an error, as it is while a graph is recorded.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcmstr_fast.train.captured import replay
from rcmstr_fast.train.distributed import recorded

aten = torch.ops.aten
#: Operations whose result, or its size, the host has to wait for.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}


class HostWaits(RuntimeError):
    """The host read a value of the device."""


class NoWaiting(TorchDispatchMode):
    """Raises HostWaits where a step would make the host wait for the device."""

    def __enter__(self):
        def read(*_):
            raise HostWaits("tolist or numpy")

        self._methods = torch.Tensor.tolist, torch.Tensor.numpy  # they read memory without an operation
        torch.Tensor.tolist = torch.Tensor.numpy = read
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist, torch.Tensor.numpy = self._methods
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            raise HostWaits(str(func))
        indexes = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if any(x is not None and x.dtype == torch.bool for x in indexes):
            raise HostWaits(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


class _Recording(NoWaiting):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "c10d", "an exchange between processes inside a recording"
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [
            isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given for x in tree_leaves(result)
        ]
        self.operations.append((func, args, kwargs or {}, result, fresh, torch.is_grad_enabled()))
        return result


class TapeRecorder:
    """A `train.captured.Recorder` on the CPU.

    Args:
        state: gives every tensor that a step changes; recording leaves them as they are.

    Attributes:
        calls: what was asked of it.
        parts: recordings and exchanges of the last recorded step.
    """

    def __init__(self, state):
        self.state, self.calls, self.parts = state, [], 0

    def direct(self, run):
        self.calls.append("direct")
        with NoWaiting():
            return run()

    def record(self, run):
        self.calls.append("record")
        before = [(x, x.detach().clone()) for x in self.state()]
        parts = []
        with contextlib.ExitStack() as tape:

            def begin():
                recording = tape.enter_context(_Recording())
                parts.append(lambda: self._replay(recording))

            def part(exchange):
                tape.close()
                parts.append(exchange)
                begin()

            begin()
            with recorded(part):
                result = run()
        self.parts = len(parts)
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)

        def again():
            self.calls.append("replay")
            replay(parts)

        return result, again

    def forget(self):
        self.calls.append("forget")

    def _replay(self, recording):
        with torch._C._AutoDispatchBelowAutograd():
            for operation in recording.operations:
                self._repeat(*operation)

    def _repeat(self, func, args, kwargs, recorded, fresh, gradients):
        with torch.set_grad_enabled(gradients):  # an LSTM's kernel depends on it
            again = func(*args, **kwargs)
            for old, new, copied in zip(tree_leaves(recorded), tree_leaves(again), fresh, strict=True):
                if copied and isinstance(new, torch.Tensor) and old.numel():
                    old.copy_(new)
