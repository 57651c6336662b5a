"""What a kernel is compiled for ahead of time."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rcmstr_fast.kernels.architectures import KNOWN, Architecture

#: Triton type -> arguments of that type; any other pointer takes the element type `rows` of a configuration.
_NAMES = {
    "i32": """M K C H W N CI CO D count parts part_size skipped part_stride key_stride hidden frames height width
        other_height other_width sites splits per_image blocks groups rows span total rows_a rows_b rows_c
        weight_tap weight_k weight_n chunks p_b p_c p_h p_w t_b t_c t_h t_w x_b x_n x_c""",
    "fp32": "tau_info tau_kl alpha share eps scale",
    "*i64": "place_ptr order_ptr starts_ptr pointer_ptr index_ptr epoch_ptr seed_ptr positive_ptr skip_ptr",
    "*fp32": """partials_ptr coefficients_ptr infos_ptr kls_ptr sums_ptr factor_ptr scale_ptr shift_ptr mean_ptr
    rstd_ptr total_ptr
        numbers_ptr var_ptr inverse_ptr plain_ptr moment_ptr""",
    "*i32": "counts_ptr positions_ptr bits_ptr count_ptr pairs_ptr pair_counts_ptr first_ptr",
    "*i1": "mask_ptr hidden_ptr active_ptr source_ptr",
    "*i8": "which_ptr",
    "*u8": "grid_ptr pixels_ptr",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}
#: Arguments of the queue losses that are tuples (see `queue_losses.similarity`).
_OPERANDS = ("*fp16", "*fp16", "*fp16", "*i64", "*i64")
GROUPED: dict[str, tuple] = {"operands": _OPERANDS, "sizes": ("i32",) * 4, "scales": ("fp32", "fp32")}


def _leaves(kind: Any, at: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Place and type of every element of a possibly nested tuple of types."""
    if isinstance(kind, str):
        yield at, kind
    else:
        for i, part in enumerate(kind):
            yield from _leaves(part, (*at, i))


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel.

    Attributes:
        name: unique; the key of the table in bench/results/aot/.
        kernel: the jitted function.
        architecture: number of one of `KNOWN`.
        constants: constexpr arguments.
        rows: Triton element type of the pointers that take the user's dtype.
        num_warps: warps a program.
        num_stages: pipeline stages.
        matrix: whether it multiplies matrices, so must use the tensor cores and pipeline its loads.
        resident: programs that must fit a multiprocessor together.
        sixteenths: sizes known to be multiples of 16; "every" for all of them.
        fp32: pointers that are fp32 whatever `rows` is.
        tuples: arguments that are tuples, with the types of their elements.
    """

    name: str
    kernel: Any
    architecture: int
    constants: dict[str, Any]
    rows: str = "fp16"
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    resident: int = 1
    sixteenths: tuple[str, ...] = ("part_size", "part_sizes")
    fp32: tuple[str, ...] = ()
    tuples: dict[str, tuple] = field(default_factory=lambda: GROUPED)

    def _type(self, name: str) -> str | tuple:
        if name in self.constants:
            return "constexpr"
        if name in self.tuples:
            return self.tuples[name]
        return "*fp32" if name in self.fp32 else _TYPES.get(name, f"*{self.rows}")

    def signature(self) -> dict[str, str | tuple]:
        """argument -> Triton type, of a tuple those of its elements."""
        return {p.name: self._type(p.name) for p in self.kernel.params}

    def aligned(self) -> list[tuple[int, ...]]:
        """Places of the arguments known to be multiples of 16: pointers of whole tensors, and `sixteenths`."""
        return [
            at
            for i, (name, kind) in enumerate(self.signature().items())
            for at, one in _leaves(kind, (i,))
            if one[0] == "*" or (one == "i32" and (name in self.sixteenths or "every" in self.sixteenths))
        ]

    def by_sixteen(self) -> "Configuration":
        """The form that runs where every size is a multiple of 16: Triton compiles it as another kernel.

        In training all sizes of the losses are; heights and widths of maps sometimes are. Between the two forms lie
        those where some sizes are multiples.
        """
        name, sm = self.name.rsplit("_", 1)
        return replace(self, name=f"{name}_by16_{sm}", sixteenths=("every",))

    @property
    def target(self) -> Architecture:
        """What it is compiled for."""
        return KNOWN[self.architecture]
