"""How many rows the chunked losses take at a time, chosen by timing.

The similarities of all rows to a whole queue do not fit into memory, so these losses go through the rows in chunks.
"""

from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

#: Similarities held at once, a few float32 tensors of 2 MiB each. Larger chunks may leave the cache between two products,
#: smaller ones wake sleeping threads more often: which is worse depends on the machine.
ELEMENTS = 1 << 19
_CANDIDATES = tuple(1 << power for power in (19, 16, 17, 18, 20, 21))
#: Rows a chunk at least, so that the products stay matrix products.
_LEAST = 32


def declare(operation: str) -> Choice:
    """The choice of the chunk of an operation whose backend `chunked` uses `rows`."""

    def candidates(setting: Setting) -> list[Value]:
        taken = setting.calls.get(operation, ())[:1] == ("chunked",)
        return list(_CANDIDATES) if taken else []

    return choices.declare(
        Choice(
            f"{operation}.chunk",
            f"similarities held at once by {operation}",
            operation,
            1.1,
            candidates,
            lambda setting: ELEMENTS,
            show=lambda value: f"2^{int(value).bit_length() - 1}",
        )
    )


def rows(choice: Choice, others: int) -> int:
    """Rows a chunk where each meets `others` rows."""
    return max(_LEAST, (choices.value(choice.name) or ELEMENTS) // others)
