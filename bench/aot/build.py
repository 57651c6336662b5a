"""Compile one Triton kernel configuration ahead of time, without a GPU, and look into what came out."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted functions cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcmstr_fast.kernels.shipped import Configuration

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "MUFU", "SHFL", "STL", "LDL")
#: What ptxas says where it makes asynchronous products wait for each other (C7510 to C7520).
_SERIALISED = re.compile(r"\(C75\d\d\)|Potential Performance Loss: wgmma")


@dataclass(frozen=True)
class Built:
    """One compiled configuration.

    Attributes:
        row: registers, stack and shared (bytes), tensor (columns of tensor memory), buffers, serialised (products
            that ptxas makes wait), and the counted SASS instructions.
        sass: the listing of nvdisasm.
    """

    row: dict[str, int]
    sass: str


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True)


def pipeline_buffers(ttgir: str) -> int:
    """The most copies of a tile that the loop keeps in shared memory; 0 where nothing is pipelined."""
    found = re.findall(r"ttg\.local_alloc\b[^\n]*!ttg\.memdesc<(\d+)x\d+x\d+xf16", ttgir)
    return max(map(int, found), default=0)


def serialised(ptx: str) -> int:
    """1 where ptxas takes the overlap out of the asynchronous products of a kernel, else 0.

    It says so only in its messages, which Triton does not keep: the code is assembled again.
    """
    name = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]  # type: ignore[index]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = _tool("ptxas", "-v", f"--gpu-name={name}", file.name, "-o", os.devnull).stderr
    return int(bool(_SERIALISED.search(said)))


def build(configuration: Configuration) -> Built:
    """Compile and inspect one configuration; no GPU is needed."""
    kernel, signature = configuration.kernel, configuration.signature()
    place = {p.name: (i,) for i, p in enumerate(kernel.params)}
    source = ASTSource(
        kernel,
        signature,
        constexprs={place[n]: v for n, v in configuration.constants.items()},
        attrs={at: [["tt.divisibility", 16]] for at in configuration.aligned()},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", configuration.architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name).stdout
        sass = _tool("nvdisasm", "-c", file.name).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED}
    row = {
        "registers": registers,
        "stack": stack,
        "shared": built.metadata.shared,
        "tensor": getattr(built.metadata, "tmem_size", 0) or 0,
        "buffers": pipeline_buffers(built.asm["ttgir"]),
        "serialised": serialised(built.asm["ptx"]) if counts["HGMMA"] else 0,
        **counts,
    }
    return Built(row, sass)
