"""Draw who imports whom, from the sources: `python -m bench.import_graph` writes docs/pictures/imports.svg.

It also prints the longest chain of modules of which each imports the next.

A box is a room of the package, an arrow points from a room to one that it imports. Arrows that a longer way already
shows are left out, so that the picture can be read; `tests/test_import_graph.py` holds it fresh.
"""

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rcmstr_fast"
PICTURE = ROOT / "docs" / "pictures" / "imports.svg"

#: What each room is for, as the picture says it.
ROOMS = {
    "cli": "the commands",
    "api": "three lines of Python",
    "study": "many runs, one page",
    "exchange": "weights in and out",
    "plots": "pictures of results",
    "measure": "timing this machine",
    "tuning": "choices and their record",
    "evaluation": "probe, fine-tune, tables",
    "train": "the loop of a run",
    "methods": "one file a method",
    "data": "pictures of any user",
    "models": "encoders, heads, decoders",
    "ops": "operations, backends",
    "kernels": "Triton",
    "_C": "csrc: C++ and CUDA",
}
_WIDTH, _HEIGHT, _GAP, _ROW = 176, 46, 26, 92


def statements(path: Path, *, later: bool = True) -> Iterator[list[str]]:
    """Names that each import statement of a file asks for, but for those for type checkers alone.

    Args:
        path: the file.
        later: also of statements that run inside functions, not when the file is imported.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            waiting += node.orelse
        elif later or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def edges() -> dict[str, set[str]]:
    """Room -> rooms that it imports, also inside functions."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in found:
            parts = [name.split(".") for names in statements(path) for name in names]
            found[room] |= {x[1] for x in parts if x[0] == "rcmstr_fast" and len(x) > 1 and x[1] in ROOMS} - {room}
    return found


def module_edges() -> dict[str, set[str]]:
    """Module -> modules that it imports when it is imported itself.

    A package stands for its `__init__.py`, where something that this file defines or hands on is asked for. Counted are
    Python files: the compiled module `_C`, which imports none of them, is not.
    """
    files = {path.relative_to(ROOT): path for path in PACKAGE.rglob("*.py")}
    files |= {Path("rcmstr_fast", path.relative_to(ROOT)): path for path in (ROOT / "kernels").rglob("*.py")}
    modules = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for package, *wanted in statements(path, later=False):
            inside = set(wanted) & modules.keys()
            found[module] |= inside
            if package in modules and (not wanted or set(wanted) - inside - {"rcmstr_fast._C"}):
                found[module].add(package)
    return found


def ranks(found: dict[str, set[str]]) -> dict[str, int]:
    """Length of the longest way from a room down to one that imports none.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    known: dict[str, int] = {}

    def rank(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise ValueError(f"circle of imports: {' -> '.join([*above, room])}")
        if room not in known:
            known[room] = 1 + max((rank(other, (*above, room)) for other in found[room]), default=-1)
        return known[room]

    for room in found:
        rank(room, ())
    return known


def longest_chain(found: dict[str, set[str]]) -> list[str]:
    """A longest way down, from the module that stands on the most others to one that imports none."""
    height = ranks(found)
    chain = [max(height, key=lambda name: height[name])]
    while below := found[chain[-1]]:
        chain.append(max(sorted(below), key=lambda name: height[name]))
    return chain


def reduced(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way shows."""

    def below(room: str) -> set[str]:
        return found[room].union(*(below(other) for other in found[room])) if found[room] else set()

    return {room: {o for o in others if not any(o in below(p) for p in others - {o})} for room, others in found.items()}


def rows_of(found: dict[str, set[str]]) -> dict[str, int]:
    """The row of each room, from 0 below: right under the lowest room that imports it, so that arrows are short."""
    row = dict(ranks(found))
    for room in sorted(row, key=lambda name: -row[name]):
        row[room] = min((row[above] for above, below in found.items() if room in below), default=row[room] + 1) - 1
    return row


def svg() -> str:
    """The picture."""
    found = edges()
    rows: dict[int, list[str]] = {}
    height_of = rows_of(found)
    for room in ROOMS:  # not in the order of a set, which differs from run to run
        rows.setdefault(height_of[room], []).append(room)
    widest = max(len(row) for row in rows.values())
    width, height = widest * (_WIDTH + _GAP) + _GAP, len(rows) * _ROW + _GAP
    place = {}
    for rank, row in rows.items():
        left = (width - len(row) * (_WIDTH + _GAP) + _GAP) / 2
        for i, room in enumerate(row):
            place[room] = (left + i * (_WIDTH + _GAP), (max(rows) - rank) * _ROW + _GAP)
    arrows = [_arrow(place[room], place[other]) for room, others in reduced(found).items() for other in sorted(others)]
    boxes = [_box(room, *place[room]) for room in ROOMS]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif">'
    )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>'
    )
    return (
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', marker, *arrows, *boxes, "</svg>"]) + "\n"
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0] + _WIDTH / 2, start[1] + _HEIGHT, end[0] + _WIDTH / 2, end[1] - 2
    middle = (y1 + y2) / 2
    path = f"M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"
    return f'<path d="{path}" fill="none" stroke="#888" stroke-width="1.3" marker-end="url(#tip)"/>'


def _box(room: str, x: float, y: float) -> str:
    name = "csrc" if room == "_C" else room
    text = ROOMS[room].removeprefix("csrc: ")
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#eef4fb" stroke="#4a7ab5"/>'
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 19:g}" text-anchor="middle" font-size="14" font-weight="600">{name}</text>'
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 36:g}" text-anchor="middle" font-size="11" fill="#555">{escape(text)}</text>'
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(svg(), encoding="utf-8")
    print(PICTURE)
    print(" -> ".join(longest_chain(module_edges())))
