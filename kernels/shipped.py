"""Every kernel configuration that a launcher can choose, with the signature it is compiled for ahead of time.

The queue-loss kernels come in each tile of `tiles` times: InfoNCE + KL at the default temperatures (ratio
7 : 4, one exponential), InfoNCE + KL at any temperatures (two exponentials), and KL alone with index maps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rcmstr_fast.kernels import batch_norm, draw_masks, enqueue, hierarchical_pool, masked_mse, project_levels, replace_tokens
from rcmstr_fast.kernels.masked import conv, norm, pool
from rcmstr_fast.kernels.masked import tiles as masked_tiles
from rcmstr_fast.kernels.queue_losses import row_terms, scheduled, similarity, tiles

ARCHITECTURES = (80, 90)
_SIZES = (
    "M",
    "query_count",
    "key_count",
    "K",
    "C",
    "H",
    "W",
    "count",
    "parts",
    "skipped",
    "part_stride",
    "key_stride",
    "hidden",
    "frames",
)
_SITES = (
    "height",
    "width",
    "other_height",
    "other_width",
    "sites",
    "splits",
    "per_image",
    "blocks",
    "groups",
    "rows",
    "span",
    "total",
    "rows_a",
    "rows_b",
    "rows_c",
)
_CHANNELS = ("N", "CI", "CO", "weight_tap", "weight_k", "weight_n", "D")
_STRIDES = ("p_b", "p_c", "p_h", "p_w", "t_b", "t_c", "t_h", "t_w", "x_b", "x_n", "x_c")
#: argument -> Triton type; pointers to rows as the user gave them take `rows` of a configuration
_TYPES: dict[str, str] = (
    {name: "i32" for name in (*_SIZES, *_SITES, *_CHANNELS, *_STRIDES, "keys_a_part")}
    | {name: "fp32" for name in ("scale_info", "scale_kl", "tau_info", "tau_kl", "alpha", "share")}
    | {name: "*fp16" for name in ("queries_ptr",)}
    | {
        name: "*i64"
        for name in (
            "query_rows_ptr",
            "key_rows_ptr",
            "place_ptr",
            "order_ptr",
            "starts_ptr",
            "pointer_ptr",
            "index_ptr",
            "epoch_ptr",
            "seed_ptr",
        )
    }
    | {name: "*fp32" for name in ("partials_ptr", "coefficients_ptr", "infos_ptr", "kls_ptr", "sums_ptr", "factor_ptr")}
    | {
        "mask_ptr": "*i1",
        "hidden_ptr": "*i1",
        "counts_ptr": "*i32",
        "active_ptr": "*i1",
        "source_ptr": "*i1",
        "which_ptr": "*i8",
        "eps": "fp32",
        "grid_ptr": "*u8",
        "pixels_ptr": "*u8",
    }
    | {f"{name}_ptr": "*i32" for name in ("positions", "bits", "count", "pairs", "pair_counts", "first")}
    | {f"{name}_ptr": "*fp32" for name in ("scale", "shift", "mean", "rstd", "numbers", "var", "inverse")}
    | {f"{name}_ptr": "*fp32" for name in ("plain", "moment")}
)
#: Tuples of a scheduled launch: element -> Triton type; one element a term, or one a term between levels.
_TUPLES = {f"{name}_ptrs": "*fp16" for name in ("queries", "keys", "queue")} | {
    f"{name}_ptrs": "*fp32" for name in ("partials", "coefficients")
}
_SIZES_OF_TERMS = ("firsts", "all_rows", "query_counts", "key_counts", "queue_sizes", "part_sizes")


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
    sixteenths: tuple[str, ...] = ("keys_a_part", "part_sizes")
    fp32: tuple[str, ...] = ()

    def _type(self, name: str) -> str | tuple[str, ...]:
        terms = self.constants.get("TERMS", 0)
        if name in self.constants:
            return "constexpr"
        if terms and name in ("query_rows_ptrs", "key_rows_ptrs"):
            return ("*i64",) * (terms - self.constants["LEVELS"])
        if terms and (name in _TUPLES or name in _SIZES_OF_TERMS):
            return (_TUPLES.get(name, "i32"),) * terms
        return "*fp32" if name in self.fp32 else _TYPES.get(name, f"*{self.rows}")

    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """argument -> Triton type, of a tuple those of its elements."""
        return {p.name: self._type(p.name) for p in self.kernel.params}

    def aligned(self) -> list[tuple[int, ...]]:
        """Places of the arguments known to be multiples of 16: pointers of whole tensors, and `sixteenths`."""
        found: list[tuple[int, ...]] = []
        for i, (name, kind) in enumerate(self.signature().items()):
            kinds = {(i,): kind} if isinstance(kind, str) else {(i, j): one for j, one in enumerate(kind)}
            found += [at for at, t in kinds.items() if t[0] == "*" or (name in self.sixteenths and t == "i32")]
        return found


def _queue_losses(architecture: int) -> Iterator[Configuration]:
    for kind, table in (("stats", tiles.STATS), ("gradient", tiles.GRADIENT)):
        for (arch, width, queries), tile in table.items():
            if arch != architecture:
                continue
            forms = {"root": (True, *tiles.power_ratio(0.07, 0.04)), "two_exp": (True, 0, 0), "kl": (False, 0, 0)}
            for form, (info, n_info, n_kl) in forms.items():
                if form == "kl" and queries == 2:
                    continue
                constants = {
                    "D": width, "QUERIES": queries, "INFO": info, "N_INFO": n_info, "N_KL": n_kl,
                    "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                }  # fmt: skip
                if kind == "gradient":
                    constants["BLOCK_D"] = tile.block_d or width
                yield Configuration(
                    f"{kind}_{form}_d{width}_q{queries}_sm{arch}",
                    similarity._stats_kernel if kind == "stats" else similarity._gradient_kernel,
                    arch, constants, "fp16", tile.num_warps, tile.num_stages, True, tile.resident,
                )  # fmt: skip


def _scheduled(arch: int) -> Iterator[Configuration]:
    """All five terms of a step: three levels of two queries, two terms between levels."""
    for kind, kernel in (
        ("stats", scheduled._scheduled_stats_kernel),
        ("gradient", scheduled._scheduled_gradient_kernel),
    ):
        for width in tiles.SCHEDULED_WIDTHS:
            tile = tiles.tile(kind, arch, width, 2)
            for form, powers in {"root": tiles.power_ratio(0.07, 0.04), "two_exp": (0, 0)}.items():
                constants = {
                    "D": width, "QUERIES": tile.queries, "LEVELS": 3, "TERMS": 5, "GROUPS": 2,
                    "N_INFO": powers[0], "N_KL": powers[1], "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                }  # fmt: skip
                if kind == "gradient":
                    constants["BLOCK_D"] = tile.block_d or width
                yield Configuration(
                    f"scheduled_{kind}_{form}_d{width}_sm{arch}", kernel, arch, constants, "fp16",
                    tile.num_warps, tile.num_stages, True, tile.resident,
                )  # fmt: skip


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
            f"replace_tokens_{way}_bf16_sm{arch}", kernel, arch, constants, "bf16", sixteenths=("C", "N", "x_b", "x_n"),
            fp32=("mask_token_ptr", "position_ptr", "out_ptr", "grad_ptr"),
        )  # fmt: skip
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_ROWS": enqueue.BLOCK_ROWS}
    yield Configuration(f"enqueue_fp32_sm{arch}", enqueue._enqueue_kernel, arch, constants, "fp32")


def _levels(arch: int) -> Iterator[Configuration]:
    """`project_levels` of the CNN (256 -> 128 channels) and the masks of both encoders."""
    for rows, strips in (("fp32", 0), ("bf16", 2)):
        shape = {"T": 26, "S": 4, "STRIPS": strips, "BLOCK_M": project_levels.BLOCK_M, "BLOCK_D": 128}
        product = {"UPCAST": False, "BLOCK_K": project_levels.BLOCK_K}
        forms: dict[str, dict[str, Any]] = {
            "fwd": {**shape, **product, "EPS": project_levels.EPS}, "rows": shape,
            "bwd": {**shape, **product, "BLOCK_D": project_levels.BLOCK_D, "LEVELS": 7},
        }  # fmt: skip
        for form, constants in forms.items():
            kernel = getattr(project_levels, f"_project_levels_{form}_kernel")
            name = f"project_levels_{form}_{rows}_n{strips}_sm{arch}"
            yield Configuration(
                name, kernel, arch, constants, rows, sixteenths=("C", "D"), fp32=("rows_ptr", "grad_ptr")
            )
    for unit, cells, pixels in (("token", (8, 32), (4, 4)), ("stage3", (4, 25), (8, 4))):
        constants = {
            "ROWS": cells[0], "COLUMNS": cells[1], "UNIT_H": pixels[0], "UNIT_W": pixels[1], "BLOCKS": 1,
            "BLOCK_CELLS": 4, "STREAM": 3, "CHUNK": draw_masks.CHUNK, "BLOCK": 256 if unit == "token" else 128,
        }  # fmt: skip
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
                **window, "TRANSPOSED": way == "dgrad", "STATS": way == "stats", "EVEN": True, "UPCAST": False,
                "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_K": shape.block_k,
                "weight_n" if way == "dgrad" else "weight_k": 1,
            }  # fmt: skip
            yield Configuration(
                f"masked_conv_{way}_k{kernel}_{k}_{n}_sm{arch}", conv._masked_conv_kernel, arch, constants,
                "fp16", shape.num_warps, shape.num_stages, True, 1, ("K", *_CHANNELS),
            )  # fmt: skip
        shape = masked_tiles.weight_tile(arch, inputs, outputs, 2)
        constants = {
            **window, "UPCAST": False,
            "BLOCK_O": shape.block_m, "BLOCK_I": shape.block_n, "BLOCK_R": shape.block_k,
        }  # fmt: skip
        yield Configuration(
            f"masked_conv_wgrad_k{kernel}_{inputs}_{outputs}_sm{arch}", conv._masked_conv_weight_kernel, arch,
            constants, "fp16", shape.num_warps, shape.num_stages, True, 1, ("CI", "CO"),
        )  # fmt: skip


def _masked_norm(arch: int) -> Iterator[Configuration]:
    blocks = {"BLOCK_S": norm.BLOCK_S, "BLOCK_C": norm.BLOCK_C}
    steps = {**blocks, "STEPS": norm.STEPS}
    moments = {"BLOCK_P": norm.MOMENTS_P, "BLOCK_C": norm.MOMENTS_C}
    forms = {
        "stats": steps, "moments": {**moments, "ROWS": 0}, "moments_tiles": {**moments, "ROWS": 128},
        "apply": {**blocks, "RESIDUAL": True, "RELU": True},
        "sums": {**steps, "RELU": True}, "grad": {**blocks, "RESIDUAL": True, "RELU": True},
    }  # fmt: skip
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
            "BLOCK_S": pool.BLOCK_S, "BLOCK_C": pool.BLOCK_C,
        }  # fmt: skip
        for way in ("fwd", "bwd"):
            kernel = getattr(pool, f"_masked_pool_{way}_kernel")
            name = f"masked_pool_{way}_{form}_bf16_sm{arch}"
            yield Configuration(name, kernel, arch, constants, "bf16", sixteenths=("C",))


PARTS = (_queue_losses, _scheduled, _row_wise, _small, _levels, _masked_conv, _masked_norm, _masked_pool, _batch_norm)


def configurations() -> list[Configuration]:
    """Every shipped configuration for every architecture."""
    return [c for arch in ARCHITECTURES for part in PARTS for c in part(arch)]
