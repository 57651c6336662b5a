"""The masked layers."""

from collections.abc import Iterator

from rcmstr_fast.kernels.architectures import KNOWN
from rcmstr_fast.kernels.masked import conv, norm, pool
from rcmstr_fast.kernels.masked import tiles as masked_tiles
from rcmstr_fast.kernels.shipped.configuration import Configuration

_CHANNELS = ("N", "CI", "CO", "weight_tap", "weight_k", "weight_n", "D")
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
            shape = masked_tiles.tile(KNOWN[arch].family, k, n, 2)
            constants = {
                **window,
                "TRANSPOSED": way == "dgrad",
                "STATS": way == "stats",
                "EVEN": True,
                "UPCAST": False,
                "NARROW": True,
                "BLOCKS_K": -(-k // shape.block_k),
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
        shape = masked_tiles.weight_tile(KNOWN[arch].family, inputs, outputs, 2)
        constants = {
            "TAPS": kernel * kernel,
            "UPCAST": False,
            "NARROW": True,
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
    constants = {"TAPS": 9, "BLOCK_R": 64, "BLOCK": conv.BLOCK_SUM}
    name, kernel = f"masked_conv_wsum_k3_sm{arch}", conv._masked_conv_weight_sum_kernel
    yield Configuration(name, kernel, arch, constants, "fp32", sixteenths=("CI", "CO"))


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


PARTS = (_masked_conv, _masked_norm, _masked_pool)
