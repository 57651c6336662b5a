"""Every kernel configuration that a launcher can choose, with the signature it is compiled for ahead of time.

The queue-loss kernels come in each tile of `tiles` times: InfoNCE + KL at the default temperatures (ratio
7 : 4, one exponential), InfoNCE + KL at any temperatures (two exponentials), and KL alone with index maps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rcmstr_fast.kernels import (
    batch_norm,
    draw_masks,
    enqueue,
    hierarchical_pool,
    masked_mse,
    project_levels,
    replace_tokens,
)
from rcmstr_fast.kernels.masked import conv, norm, pool
from rcmstr_fast.kernels.masked import tiles as masked_tiles
from rcmstr_fast.kernels.queue_losses import row_terms, scheduled, similarity, tiles

ARCHITECTURES = (80, 90)
#: Triton type -> arguments of that type; any other pointer takes the element type `rows` of a configuration.
_NAMES = {
    "i32": """M K C H W N CI CO D count parts part_size skipped part_stride key_stride hidden frames height width
        other_height other_width sites splits per_image blocks groups rows span total rows_a rows_b rows_c
        weight_tap weight_k weight_n p_b p_c p_h p_w t_b t_c t_h t_w x_b x_n x_c""",
    "fp32": "tau_info tau_kl alpha share eps",
    "*i64": "place_ptr order_ptr starts_ptr pointer_ptr index_ptr epoch_ptr seed_ptr",
    "*fp32": """partials_ptr coefficients_ptr infos_ptr kls_ptr sums_ptr factor_ptr scale_ptr shift_ptr mean_ptr
    rstd_ptr
        numbers_ptr var_ptr inverse_ptr plain_ptr moment_ptr""",
    "*i32": "counts_ptr positions_ptr bits_ptr count_ptr pairs_ptr pair_counts_ptr first_ptr",
    "*i1": "mask_ptr hidden_ptr active_ptr source_ptr",
    "*i8": "which_ptr",
    "*u8": "grid_ptr pixels_ptr",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_CHANNELS = ("N", "CI", "CO", "weight_tap", "weight_k", "weight_n", "D")
#: Arguments of the queue losses that are tuples (see `queue_losses.similarity`).
_OPERANDS = ("*fp16", "*fp16", "*fp16", "*i64", "*i64")
_GROUPED: dict[str, tuple] = {"operands": _OPERANDS, "sizes": ("i32",) * 4, "scales": ("fp32", "fp32")}


def _of_terms(terms: int, levels: int) -> dict[str, tuple]:
    """Arguments of a scheduled launch: tuples with an entry for each term, `rows_of_pairs` for terms between levels."""
    floats, ints = ("*fp32",) * terms, ("i32",) * terms
    return {
        "tables": (("*fp16",) * terms,) * 3,
        "rows_of_pairs": (("*i64",) * (terms - levels),) * 2,
        "all_sizes": (ints,) * 4,
        **dict.fromkeys(("partials_ptrs", "coefficients_ptrs"), floats),
        **dict.fromkeys(("firsts", "part_sizes"), ints),
    }


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
        architecture: 80 or 90.
        constants: constexpr arguments.
        rows: Triton element type of the pointers that take the user's dtype.
        num_warps: warps a program.
        num_stages: pipeline stages.
        matrix: whether it multiplies matrices, so must use the tensor cores and pipeline its loads.
        resident: programs that must fit a multiprocessor together.
        sixteenths: sizes known to be multiples of 16.
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
    tuples: dict[str, tuple] = field(default_factory=lambda: _GROUPED)

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
            if one[0] == "*" or (name in self.sixteenths and one == "i32")
        ]


def _queue_losses(architecture: int) -> Iterator[Configuration]:
    for kind, table in (("stats", tiles.STATS), ("gradient", tiles.GRADIENT)):
        for (arch, width, queries), tile in table.items():
            if arch != architecture:
                continue
            kernel = similarity._stats_kernel if kind == "stats" else similarity._gradient_kernel
            forms = {"root": (True, tiles.power_ratio(0.07, 0.04)), "two_exp": (True, (0, 0)), "kl": (False, (0, 0))}
            for form, (info, powers) in forms.items():
                if form == "kl" and queries == 2:
                    continue
                constants = {"FORM": similarity.form(tile, width, info, powers)}
                name = f"{kind}_{form}_d{width}_q{queries}_sm{arch}"
                yield _product(name, kernel, arch, constants, tile)


def _product(
    name: str, kernel: Any, arch: int, constants: dict[str, Any], tile: tiles.Tile, **more: Any
) -> Configuration:
    """A kernel of the queue losses with a tile."""
    return Configuration(
        name,
        kernel,
        arch,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=True,
        resident=tile.resident,
        **more,
    )


def _scheduled(arch: int) -> Iterator[Configuration]:
    """All five terms of a step: three levels of two queries, two terms between levels."""
    for kind, kernel in (
        ("stats", scheduled._scheduled_stats_kernel),
        ("gradient", scheduled._scheduled_gradient_kernel),
    ):
        for width in tiles.SCHEDULED_WIDTHS:
            tile = tiles.tile(kind, arch, width, 2)
            for form, powers in {"root": tiles.power_ratio(0.07, 0.04), "two_exp": (0, 0)}.items():
                made = similarity.form(tile, width, True, powers)
                constants = {"LEVELS": 3, "GROUPS": 2, "FORM": made, "PAIRS": scheduled.pairs_form(made)}
                name = f"scheduled_{kind}_{form}_d{width}_sm{arch}"
                yield _product(name, kernel, arch, constants, tile, tuples=_GROUPED | _of_terms(5, 3))


def _row_wise(arch: int) -> Iterator[Configuration]:
    for rows, widths in (("fp32", tiles.WIDTHS), ("bf16", (128,))):
        for width in widths:
            constants = {"D": width, "BLOCK_M": 16}
            name = f"{rows}_d{width}_sm{arch}"
            yield Configuration(
                f"row_terms_{name}", row_terms._row_terms_kernel, arch, {**constants, "INFO": True}, rows
            )
            yield Configuration(f"reduce_{name}", row_terms._reduce_kernel, arch, constants, rows)
    constants = {"D": 128, "BLOCK_M": 16, "INFO": False}
    yield Configuration(f"row_terms_kl_fp16_d128_sm{arch}", row_terms._row_terms_kernel, arch, constants)
    yield Configuration(f"gather_fp32_d128_sm{arch}", row_terms._gather_kernel, arch, {"D": 128}, "fp32")


def _small(arch: int) -> Iterator[Configuration]:
    for rows, strips in (("fp32", 0), ("bf16", 2)):
        sizes = {"T": 26, "S": 4, "STRIPS": strips, "BLOCK_T": 32, "BLOCK_C": 64}
        for way in ("fwd", "bwd"):
            kernel = getattr(hierarchical_pool, f"_hierarchical_pool_{way}_kernel")
            yield Configuration(f"pool_{way}_{rows}_n{strips}_sm{arch}", kernel, arch, sizes, rows)
            kernel = getattr(masked_mse, f"_masked_mse_{way}_kernel")
            constants = {"CHANNELS": 3, "BLOCK": masked_mse.BLOCK}
            yield Configuration(f"masked_mse_{way}_{rows}_sm{arch}", kernel, arch, constants, rows)
    blocks = {"BLOCK_R": replace_tokens.BLOCK_R, "BLOCK_C": replace_tokens.BLOCK_C}
    for way, constants in {"fwd": {**blocks, "x_c": 1}, "bwd": blocks}.items():
        kernel = getattr(replace_tokens, f"_replace_tokens_{way}_kernel")
        yield Configuration(
            f"replace_tokens_{way}_bf16_sm{arch}",
            kernel,
            arch,
            constants,
            "bf16",
            sixteenths=("C", "N", "x_b", "x_n"),
            fp32=("mask_token_ptr", "position_ptr", "out_ptr", "grad_ptr"),
        )
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_ROWS": enqueue.BLOCK_ROWS}
    yield Configuration(f"enqueue_fp32_sm{arch}", enqueue._enqueue_kernel, arch, constants, "fp32")


def _levels(arch: int) -> Iterator[Configuration]:
    """`project_levels` of the CNN (256 -> 128 channels) and the masks of both encoders."""
    for rows, strips in (("fp32", 0), ("bf16", 2)):
        shape = {"T": 26, "S": 4, "STRIPS": strips, "BLOCK_M": project_levels.BLOCK_M, "BLOCK_D": 128}
        product = {"UPCAST": False, "BLOCK_K": project_levels.BLOCK_K}
        forms: dict[str, dict[str, Any]] = {
            "fwd": {**shape, **product, "EPS": project_levels.EPS},
            "rows": shape,
            "bwd": {**shape, **product, "BLOCK_D": project_levels.BLOCK_D, "LEVELS": 7},
        }
        for form, constants in forms.items():
            kernel = getattr(project_levels, f"_project_levels_{form}_kernel")
            name = f"project_levels_{form}_{rows}_n{strips}_sm{arch}"
            yield Configuration(
                name, kernel, arch, constants, rows, sixteenths=("C", "D"), fp32=("rows_ptr", "grad_ptr")
            )
    for unit, cells, pixels in (("token", (8, 32), (4, 4)), ("stage3", (4, 25), (8, 4))):
        constants = {
            "ROWS": cells[0],
            "COLUMNS": cells[1],
            "UNIT_H": pixels[0],
            "UNIT_W": pixels[1],
            "BLOCKS": 1,
            "BLOCK_CELLS": 4,
            "STREAM": 3,
            "CHUNK": draw_masks.CHUNK,
            "BLOCK": 256 if unit == "token" else 128,
        }
        yield Configuration(f"draw_masks_{unit}_sm{arch}", draw_masks._draw_masks_kernel, arch, constants)


#: (in, out channels, kernel, stride, padding) of the ResNet's sparse convolutions, one a form of tile.
_CONVOLUTIONS = (
    (512, 512, 3, (1, 1), (1, 1)),
    (128, 128, 3, (1, 1), (1, 1)),
    (64, 64, 3, (1, 1), (1, 1)),
    (32, 32, 3, (1, 1), (1, 1)),
    (512, 512, 2, (2, 1), (0, 1)),
    (256, 512, 1, (1, 1), (0, 0)),
)


def _masked_conv(arch: int) -> Iterator[Configuration]:
    for inputs, outputs, kernel, stride, padding in _CONVOLUTIONS:
        window = {"WINDOW": (kernel, kernel, *stride, *padding)}
        ways = {"fwd": (inputs, outputs), "stats": (inputs, outputs), "dgrad": (outputs, inputs)}
        for way, (k, n) in ways.items():
            shape = masked_tiles.tile(arch, k, n, 2)
            constants = {
                **window,
                "TRANSPOSED": way == "dgrad",
                "STATS": way == "stats",
                "EVEN": True,
                "UPCAST": False,
                "BLOCK_M": shape.block_m,
                "BLOCK_N": shape.block_n,
                "BLOCK_K": shape.block_k,
                "weight_n" if way == "dgrad" else "weight_k": 1,
            }
            yield Configuration(
                f"masked_conv_{way}_k{kernel}_{k}_{n}_sm{arch}",
                conv._masked_conv_kernel,
                arch,
                constants,
                "fp16",
                shape.num_warps,
                shape.num_stages,
                True,
                1,
                ("K", *_CHANNELS),
            )
        shape = masked_tiles.weight_tile(arch, inputs, outputs, 2)
        constants = {
            **window,
            "UPCAST": False,
            "BLOCK_O": shape.block_m,
            "BLOCK_I": shape.block_n,
            "BLOCK_R": shape.block_k,
        }
        yield Configuration(
            f"masked_conv_wgrad_k{kernel}_{inputs}_{outputs}_sm{arch}",
            conv._masked_conv_weight_kernel,
            arch,
            constants,
            "fp16",
            shape.num_warps,
            shape.num_stages,
            True,
            1,
            ("CI", "CO"),
        )


def _masked_norm(arch: int) -> Iterator[Configuration]:
    blocks = {"BLOCK_S": norm.BLOCK_S, "BLOCK_C": norm.BLOCK_C}
    steps = {**blocks, "STEPS": norm.STEPS}
    moments = {"BLOCK_P": norm.MOMENTS_P, "BLOCK_C": norm.MOMENTS_C}
    forms = {
        "stats": steps,
        "moments": {**moments, "ROWS": 0},
        "moments_tiles": {**moments, "ROWS": 128},
        "apply": {**blocks, "RESIDUAL": True, "RELU": True},
        "sums": {**steps, "RELU": True},
        "grad": {**blocks, "RESIDUAL": True, "RELU": True},
    }
    for form, constants in forms.items():
        kernel = getattr(norm, f"_masked_norm_{form.removesuffix('_tiles')}_kernel")
        name = f"masked_norm_{form}_bf16_sm{arch}"
        yield Configuration(name, kernel, arch, constants, "bf16", 4, 3, False, 1, ("C",))


def _batch_norm(arch: int) -> Iterator[Configuration]:
    blocks = {"BLOCK_R": batch_norm.BLOCK_R, "BLOCK_C": batch_norm.BLOCK_C}
    whole = {**blocks, "RESIDUAL": True, "RELU": True}
    forms = {
        "stats": blocks,
        "moments": {**blocks, "BLOCK_P": batch_norm.BLOCK_P},
        "apply": whole,
        "sums": whole,
        "grad": whole,
    }
    for form, constants in forms.items():
        kernel = getattr(batch_norm, f"_batch_norm_{form}_kernel")
        yield Configuration(f"batch_norm_{form}_bf16_sm{arch}", kernel, arch, constants, "bf16", sixteenths=("C",))


def _masked_pool(arch: int) -> Iterator[Configuration]:
    for form, stride, padding in (("halve", (2, 2), (0, 0)), ("odd", (2, 1), (0, 1))):
        constants = {
            "WINDOW": (2, 2, *stride, *padding),
            "BLOCK_S": pool.BLOCK_S,
            "BLOCK_C": pool.BLOCK_C,
        }
        for way in ("fwd", "bwd"):
            kernel = getattr(pool, f"_masked_pool_{way}_kernel")
            name = f"masked_pool_{way}_{form}_bf16_sm{arch}"
            yield Configuration(name, kernel, arch, constants, "bf16", sixteenths=("C",))


PARTS = (_queue_losses, _scheduled, _row_wise, _small, _levels, _masked_conv, _masked_norm, _masked_pool, _batch_norm)


def configurations() -> list[Configuration]:
    """Every shipped configuration for every architecture."""
    return [c for arch in ARCHITECTURES for part in PARTS for c in part(arch)]
