"""docs/performance.md and docs/results.md from the records in `bench/results`, and the tables of README and recipes.

    python -m bench.report [--check]

`--check` writes nothing and ends with status 1 where a page is not what the records say.
"""

import argparse
import sys
from pathlib import Path

from bench.report import blocks, performance, recipes, results
from bench.report.rows import load, studies

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    records = load(RESULTS)
    short = results.short(records, studies(RESULTS))
    pages = {
        "docs/performance.md": performance.page(records, RESULTS),
        "docs/results.md": results.page(records, studies(RESULTS)),
        "docs/recipes.md": _with_block(DOCS / "recipes.md", "recipes", recipes.block()),
        "README.md": _with_block(DOCS.parent / "README.md", "results", short),
    }
    if options.check:
        stale = [name for name, text in pages.items() if _text(DOCS.parent / name) != text]
        for name in stale:
            print(f"{name} is not what the records say; run python -m bench.report")
        return int(bool(stale))
    from bench.report import plots

    for name, text in pages.items():
        (DOCS.parent / name).write_text(text, encoding="utf-8")
    plots.write(records, DOCS / "plots")
    results.write_study_plots(studies(RESULTS), DOCS / "plots")
    return 0


def _with_block(path: Path, name: str, body: str) -> str:
    """A hand-written page with its generated block; the block alone where there is no such page."""
    return blocks.replace(_text(path), name, body) if path.is_file() else body


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
