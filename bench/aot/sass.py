"""Read a SASS listing: its instructions, its main loop, and what each instruction occupies.

Rates are those of the tables of throughput in NVIDIA's CUDA C++ Programming Guide, for a quarter of a multiprocessor (a
scheduler with its pipes): cycles that one instruction of a warp holds its pipe.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")
_REGISTER = re.compile(r"\b(?:UR\d+|R\d+|UP\d|P\d)\b")

_PIPES = {
    "fma": "FFMA FADD FMUL FFMA2 FADD32I FMUL32I FFMA32I",
    "imad": "IMAD IMAD32I IDP",
    "alu": """IADD3 IADD LOP3 LOP SHF ISETP FSETP FMNMX SEL FSEL PRMT LEA MOV IABS PLOP3 P2R R2P SGXT VIADD IMNMX
        VIMNMX BMSK CS2R FCHK FSWZADD VOTE POPC F2FP F2F I2F F2I HADD2 HMUL2 HFMA2 I2FP F2IP R2UR""",
    "mufu": "MUFU",
    "shared": "LDS STS LDSM STSM SHFL",
    "global": "LDG STG LDGSTS LD ST ATOMG RED",
    "barrier": "BAR WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE WARPSYNC SYNCS ERRBAR CCTL",
    "control": "BRA BSSY BSYNC NOP EXIT RET YIELD CALL",
    "tensor": "HMMA HGMMA UTCHMMA",
}
_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
#: architecture -> pipe -> cycles an instruction of a warp holds it.
HOLDS = {
    80: {"fma": 2, "imad": 2, "alu": 2, "mufu": 8, "uniform": 2},
    90: {"fma": 1, "imad": 2, "alu": 2, "mufu": 8, "uniform": 2},
}


@dataclass
class Instruction:
    """One instruction of a warp.

    Attributes:
        op: with its suffixes.
        pipe: of `_PIPES`, or "uniform", or "other".
        text: without the predicate.
        reads: registers and predicates.
        writes: likewise.
        tensor: cycles of the tensor cores (of all four quarters together for HGMMA).
        bytes: that pass between a warp and shared memory.
        fetched: bytes that a warp asks of global memory.
    """

    op: str
    pipe: str
    text: str
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    tensor: float = 0.0
    bytes: int = 0
    fetched: int = 0


def main_loop(listing: str) -> list[str]:
    """Instructions of the shortest loop among those with the most matrix products; empty without any."""
    lines, labels = [], {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append(found[1])
    loops = []
    for end, text in enumerate(lines):
        found = _BRANCH.search(text)
        if found and labels.get(found[1], end + 1) <= end:
            body = lines[labels[found[1]] : end + 1]
            loops.append((sum(bool(_PRODUCT.search(t)) for t in body), -len(body), body))
    best = max(loops, key=lambda loop: loop[:2], default=(0, 0, []))
    return best[2] if best[0] else []


def _from(name: str, count: int) -> set[str]:
    """`count` registers from one on."""
    found = re.match(r"(U?R)(\d+)", name)
    return {f"{found[1]}{int(found[2]) + i}" for i in range(count)} if found else set()


def parse(text: str) -> Instruction:
    """One instruction."""
    guard = re.match(r"@!?(U?P\w+)\s+(.*)", text)
    reads = {guard[1]} if guard else set()
    text = guard[2] if guard else text
    op, _, rest = text.partition(" ")
    base = op.split(".")[0]
    pipe = _OF.get(base) or ("uniform" if base.startswith(("U", "S2UR")) else "other")
    made = Instruction(op, pipe, text, reads)
    operands = [part.strip() for part in re.split(r",(?![^\[]*\])", rest)]
    if base == "HGMMA":
        _asynchronous_product(made, op, operands, rest)
    elif base == "HMMA":
        made.tensor = 8.0 if ".16816" in op else 4.0
        made.writes = _from(operands[0], 4)
        for name, count in zip(operands[1:4], (4, 2, 4)):
            made.reads |= _from(name, count)
    else:
        _ordinary(made, op, base, operands)
    return made


def _asynchronous_product(made: Instruction, op: str, operands: list[str], rest: str) -> None:
    """wgmma m64nNk16: N / 2 cycles; operands in shared memory pass at 128 bytes a cycle."""
    columns = int(re.match(r"HGMMA\.64x(\d+)x", op)[1])  # type: ignore[index]
    in_registers = bool(re.match(r"R\d+", operands[1]))
    made.bytes = 32 * columns + (0 if in_registers else 64 * 32)
    made.tensor = columns / 2
    made.reads |= _from(operands[1], 4) if in_registers else set()
    for name in re.findall(r"gdesc\[(UR\d+)\]", rest):
        made.reads |= _from(name, 4)


def _ordinary(made: Instruction, op: str, base: str, operands: list[str]) -> None:
    size = next((n for word, n in ((".128", 16), (".64", 8), (".U16", 2), (".U8", 1)) if word in op), 4)
    if base in ("LDSM", "STSM"):
        count = int(op[-1]) if op[-1].isdigit() else 1
        made.bytes = 128 * count
        made.writes, made.reads = (
            (_from(operands[0], count), made.reads | set(_REGISTER.findall(operands[1])))
            if base == "LDSM"
            else (set(), made.reads | _from(operands[1], count) | set(_REGISTER.findall(operands[0])))
        )
        return
    stores = base in ("STS", "STG", "LDGSTS", "ST", "RED")
    if made.pipe == "shared":
        made.bytes = 128 if base == "SHFL" else 32 * size
    if base == "LDGSTS":
        made.bytes = made.fetched = 32 * size
    elif made.pipe == "global":
        made.fetched = 32 * size
    results = 0 if stores else 2 if base in ("ISETP", "FSETP", "PLOP3", "UISETP", "UPLOP3") else 1
    wide = 2 if ".WIDE" in op or (".64" in op and not stores) else 1
    for place, operand in enumerate(operands):
        names = set(_REGISTER.findall(operand))
        if place < results:
            for name in names:
                made.writes |= _from(name, size // 4 if base in ("LDS", "LDG") and size > 4 else wide) or {name}
        else:
            made.reads |= names


def counts(body: list[Instruction]) -> dict[str, int]:
    """Instructions by pipe."""
    return dict(Counter(one.pipe for one in body))


def bounds(body: list[Instruction], warps: int, architecture: int) -> dict[str, float]:
    """Cycles of a multiprocessor that a program's iteration holds each pipe, and the issue slots.

    Args:
        body: the loop.
        warps: of the program.
        architecture: 80 or 90.
    """
    holds, quarter = HOLDS[architecture], warps / 4
    found = {pipe: cycles * quarter * sum(one.pipe == pipe for one in body) for pipe, cycles in holds.items()}
    found["fma"] += found.pop("imad")
    groups = quarter  # a warpgroup issues HGMMA for its four quarters; HMMA is issued by each warp for its own
    found["tensor"] = groups * sum(one.tensor for one in body)
    per_warp = sum(one.bytes for one in body if not one.op.startswith("HGMMA"))
    per_group = sum(one.bytes for one in body if one.op.startswith("HGMMA"))
    found["shared"] = (warps * per_warp + groups * per_group) / 128
    found["global"] = warps * sum(one.fetched for one in body) / 64  # from the L2 cache
    found["issue"] = quarter * len(body)
    return found
