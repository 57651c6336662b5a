"""Everything that is neither a loss over a queue nor a masked layer."""

from collections.abc import Iterator
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
from rcmstr_fast.kernels.shipped.configuration import Configuration


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
    for name, width in (("", 128), ("_d4096", 4096)):
        constants = {"D": width, "BLOCK_D": width, "BLOCK_ROWS": enqueue.block_rows(width)}
        yield Configuration(f"enqueue{name}_fp32_sm{arch}", enqueue._enqueue_kernel, arch, constants, "fp32")


def _levels(arch: int) -> Iterator[Configuration]:
    """`project_levels` of the CNN (256 -> 128 channels) and at its widest; masks, also the largest."""
    for rows, strips, width in (("fp32", 0, 128), ("bf16", 2, 128), ("fp32", 0, 256), ("bf16", 2, 256)):
        shape = {"T": 26, "S": 4, "STRIPS": strips, "BLOCK_M": project_levels.BLOCK_M, "BLOCK_D": width}
        product = {"UPCAST": False, "BLOCK_K": project_levels.BLOCK_K}
        forms: dict[str, dict[str, Any]] = {
            "fwd": {**shape, **product, "EPS": project_levels.EPS},
            "rows": shape,
            "bwd": {**shape, **product, "BLOCK_D": project_levels.BLOCK_D, "LEVELS": 7},
        }
        for form, constants in forms.items():
            kernel = getattr(project_levels, f"_project_levels_{form}_kernel")
            if form == "bwd" and width > 128:
                continue  # it takes the columns in blocks: the same kernel
            name = f"project_levels_{form}_{rows}_n{strips}{'_d256' if width > 128 else ''}_sm{arch}"
            warps = 4 if form == "bwd" else project_levels.warps(width)
            yield Configuration(
                name, kernel, arch, constants, rows, warps, sixteenths=("C", "D"), fp32=("rows_ptr", "grad_ptr")
            )
    units = {
        "token": ((8, 32), (4, 4)),
        "stage3": ((4, 25), (8, 4)),
        "c512": ((8, 64), (4, 4)),
        "c1024": ((8, 128), (4, 4)),
    }
    for unit, (cells, pixels) in units.items():
        constants = {
            "ROWS": cells[0],
            "COLUMNS": cells[1],
            "UNIT_H": pixels[0],
            "UNIT_W": pixels[1],
            "BLOCKS": 1,
            "BLOCK_CELLS": 4,
            "STREAM": 3,
            "CHUNK": draw_masks.chunk(cells[0] * cells[1]),
            "BLOCK": 1 << (cells[0] * cells[1] - 1).bit_length(),
        }
        name, warps = f"draw_masks_{unit}_sm{arch}", draw_masks.warps(cells[0] * cells[1])
        yield Configuration(name, draw_masks._draw_masks_kernel, arch, constants, num_warps=warps)


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


PARTS = (_small, _levels, _batch_norm)
