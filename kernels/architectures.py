"""NVIDIA GPUs as the kernels see them: their tensor cores and their shared memory; no torch, no triton.

Tile tables know four families. A GPU belongs to the one whose instructions and shared memory it has, whatever its name:
  80   mma.sync, 163 KiB a program (A100; Orin)
  86   mma.sync, 99 KiB a program (A10, RTX 30 and 40, L4, L40, RTX 50, RTX PRO)
  90   wgmma, 227 KiB a program (H100, H200)
  100  tcgen05 and tensor memory, 227 KiB a program (B200, B300)
Figures: CUDA C++ Programming Guide, table of technical specifications per compute capability.
"""

from dataclasses import dataclass

#: Least compute capability: below, tensor cores lack bf16 and loads cannot be pipelined (cp.async).
LEAST = (8, 0)
#: Bytes of shared memory that a program of the smallest family takes at most.
SMALL_SHARED = 99 << 10
#: The same of families 80, and of 90 and 100.
LARGE_SHARED, LARGEST_SHARED = 163 << 10, 227 << 10
FAMILIES = (80, 86, 90, 100)


@dataclass(frozen=True)
class Architecture:
    """A GPU that kernels are compiled for ahead of time.

    Attributes:
        number: compute capability, 10 major + minor.
        shared: bytes of shared memory a program may ask for (`shared_memory_per_block_optin`).
        together: bytes of a multiprocessor; each program takes 1 KiB of it besides its own.
        products: SASS instructions of its matrix product, the intended one first.
    """

    number: int
    shared: int
    together: int
    products: tuple[str, ...]

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor."""
        return divmod(self.number, 10)

    @property
    def family(self) -> int:
        """Whose tiles it takes."""
        return family(self.capability, self.shared)


#: number -> what kernels are compiled for.
KNOWN = {
    one.number: one
    for one in (
        Architecture(80, LARGE_SHARED, 164 << 10, ("HMMA",)),
        Architecture(86, SMALL_SHARED, 100 << 10, ("HMMA",)),
        Architecture(89, SMALL_SHARED, 100 << 10, ("HMMA",)),
        Architecture(90, LARGEST_SHARED, 228 << 10, ("HGMMA",)),
        Architecture(100, LARGEST_SHARED, 228 << 10, ("UTCHMMA",)),
        Architecture(120, SMALL_SHARED, 100 << 10, ("HMMA",)),
    )
}


def refusal(capability: tuple[int, int], shared: int) -> str:
    """Why no kernel runs on a GPU; empty: they do.

    Args:
        capability: compute capability, major and minor.
        shared: bytes of shared memory a block may ask for.
    """
    name = ".".join(map(str, capability))
    if capability < LEAST:
        lacks = "its tensor cores have no bf16 and its loads no pipeline" if capability >= (7, 0) else "no tensor cores"
        return f"the GPU must have compute capability 8.0 or more, got {name} ({lacks})"
    if shared < SMALL_SHARED:
        return (
            f"a block needs {SMALL_SHARED >> 10} KiB of shared memory, the GPU (compute capability {name}) gives "
            + (f"{shared >> 10} KiB")
        )
    return ""


def family(capability: tuple[int, int], shared: int) -> int:
    """Whose tiles a GPU takes: 80, 86, 90 or 100.

    Args:
        capability: compute capability, major and minor, at least `LEAST`.
        shared: bytes of shared memory a block may ask for.
    """
    if shared >= LARGEST_SHARED and capability[0] in (9, 10, 11):
        return 90 if capability[0] == 9 else 100
    return 80 if shared >= LARGE_SHARED and capability[0] < 9 else 86
