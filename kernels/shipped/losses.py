"""The queue losses and the loss within a batch."""

from collections.abc import Iterator
from typing import Any

from rcmstr_fast.kernels import in_batch
from rcmstr_fast.kernels.architectures import KNOWN
from rcmstr_fast.kernels.queue_losses import row_terms, scheduled, similarity, tiles
from rcmstr_fast.kernels.shipped.configuration import GROUPED, Configuration


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


#: Part of the name -> rows of a queue whose steps are not all whole, or all are.
_QUEUES = {"": 1, "_whole": 1 << 16}


def _queue_losses(architecture: int) -> Iterator[Configuration]:
    for kind, table in (("stats", tiles.STATS), ("gradient", tiles.GRADIENT)):
        for (family, width, queries), tile in table.items():
            if family != KNOWN[architecture].family:
                continue
            kernel = similarity._stats_kernel if kind == "stats" else similarity._gradient_kernel
            forms = {"root": (True, tiles.power_ratio(0.07, 0.04)), "two_exp": (True, (0, 0)), "kl": (False, (0, 0))}
            for form, (info, powers) in forms.items():
                if form == "kl" and queries == 2:
                    continue
                name = f"{kind}_{form}_d{width}_q{queries}"
                for whole, keys in _QUEUES.items():
                    constants = {"FORM": similarity.form(tile, width, info, powers, keys)}
                    yield _product(f"{name}{whole}_sm{architecture}", kernel, architecture, constants, tile)


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
        family = KNOWN[arch].family
        for width in (w for k, w in tiles.SCHEDULED if k == kind and family in tiles.SCHEDULED[k, w]):
            tile = tiles.tile(kind, family, width, 2)
            for form, powers in {"root": tiles.power_ratio(0.07, 0.04), "two_exp": (0, 0)}.items():
                name, tuples = f"scheduled_{kind}_{form}_d{width}", GROUPED | _of_terms(5, 3)
                for whole, keys in _QUEUES.items():
                    made = similarity.form(tile, width, True, powers, keys)
                    constants = {"LEVELS": 3, "GROUPS": 2, "FORM": made, "PAIRS": scheduled.pairs_form(made)}
                    yield _product(f"{name}{whole}_sm{arch}", kernel, arch, constants, tile, tuples=tuples)


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


def _in_batch(arch: int) -> Iterator[Configuration]:
    for width in in_batch.WIDTHS:
        tile = in_batch.tile(KNOWN[arch].family, width)
        constants = {"D": width, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        for form, kernel in (
            ("stats", in_batch._stats_kernel),
            ("grad_query", in_batch._grad_query_kernel),
            ("grad_candidates", in_batch._grad_candidates_kernel),
        ):
            name = f"info_nce_{form}_d{width}_sm{arch}"
            yield _product(name, kernel, arch, constants, tile, sixteenths=(), fp32=("grad_ptr", "loss_ptr"))


PARTS = (_queue_losses, _scheduled, _row_wise, _in_batch)
