"""Compile every shipped Triton kernel ahead of time, without a GPU, and hold the result against a committed table.

    python -m bench.aot                 check against bench/results/aot/triton-<version>.json
    python -m bench.aot --write         write that table; with --only TEXT just the rows whose name contains TEXT

What a configuration must satisfy whatever the table says: no stack and no local-memory traffic (a register count alone
proves nothing: ptxas reports 32 registers for kernels that live on the stack), shared memory and registers of
`resident` programs within the multiprocessor, wgmma on sm_90 and mma on sm_80, and a pipelined loop with the buffers it
asks for.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted functions cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcmstr_fast.kernels.shipped import Configuration, configurations

TABLES = Path(__file__).parent / "results" / "aot"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: architecture -> shared memory in bytes of a program, of a multiprocessor (1 KiB of it is taken a program)
SHARED = {80: (163 << 10, 164 << 10), 90: (227 << 10, 228 << 10)}
COUNTED = ("HGMMA", "HMMA", "LDGSTS", "MUFU", "SHFL", "STL", "LDL")


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def pipeline_buffers(ttgir: str) -> int:
    """The most copies of a tile that the loop keeps in shared memory; 0 where nothing is pipelined."""
    found = re.findall(r"ttg\.local_alloc\b[^\n]*!ttg\.memdesc<(\d+)x\d+x\d+xf16", ttgir)
    return max(map(int, found), default=0)


def compile_one(configuration: Configuration) -> dict[str, int]:
    """Compile and inspect one configuration.

    Args:
        configuration: what to compile; no GPU is needed.
    Returns:
        registers, stack and shared (bytes), buffers, and the counted SASS instructions.
    """
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
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED}
    shared, buffers = built.metadata.shared, pipeline_buffers(built.asm["ttgir"])
    return {"registers": registers, "stack": stack, "shared": shared, "buffers": buffers, **counts}


def faults(configuration: Configuration, found: dict[str, int]) -> list[str]:
    """Why a compiled configuration may not be shipped (empty: it may)."""
    wrong = [f"{name} is {found[name]}, must be 0" for name in ("stack", "STL", "LDL") if found[name]]
    program, multiprocessor = SHARED[configuration.architecture]
    together = configuration.resident
    if found["shared"] > program or together * (found["shared"] + 1024) > multiprocessor:
        wrong.append(f"shared memory {found['shared']} does not fit {together} programs")
    if together * found["registers"] * 32 * configuration.num_warps > 65536:
        wrong.append(
            f"{found['registers']} registers do not fit {together} programs of {configuration.num_warps} warps"
        )
    if configuration.matrix:
        instruction = "HGMMA" if configuration.architecture >= 90 else "HMMA"
        if not found[instruction]:
            wrong.append(f"no {instruction}: the tensor cores are not used as intended")
        if found["buffers"] < configuration.num_stages - 1:
            wrong.append(f"{found['buffers']} pipeline buffers, {configuration.num_stages - 1} intended")
    return wrong


def table_path() -> Path:
    """The committed table of the Triton that is installed."""
    return TABLES / f"triton-{triton.__version__}.json"


def main(arguments: list[str] | None = None) -> int:
    """Compile everything; print faults and differences; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true", help="write the table of the installed Triton version")
    parser.add_argument("--only", default="", help="only configurations whose name contains this text")
    options = parser.parse_args(arguments)
    chosen = [c for c in configurations() if options.only in c.name]
    table = {c.name: compile_one(c) for c in chosen}
    problems = [f"{c.name}: {fault}" for c in chosen for fault in faults(c, table[c.name])]
    committed = json.loads(table_path().read_text(encoding="utf-8")) if table_path().exists() else {}
    if options.write:
        kept = {name: row for name, row in committed.items() if options.only not in name}
        table_path().write_text(json.dumps(kept | table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    elif committed:
        for name, found in table.items():
            if committed.get(name) != found:
                problems.append(f"{name}: compiled to {found}, the table says {committed.get(name)}")
        if not options.only:
            problems += [f"{name}: in the table, no longer shipped" for name in sorted(set(committed) - set(table))]
    print("\n".join([*problems, f"triton {triton.__version__}: {len(table)} configurations, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
