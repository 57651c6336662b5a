"""`rcmstr doctor`: what is installed, what this machine can run, and why not the rest."""

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast import env

NAME = "doctor"
HELP = "show versions, hardware and the backend of each operation"


def add_arguments(parser: ArgumentParser) -> None:
    """`--json` and `--check`."""
    parser.add_argument("--check", action="store_true", help="run every compiled backend against the reference")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: Namespace) -> int:
    """Print the report, or (`--check`) the agreement of every backend; 1 where one disagrees."""
    if arguments.check:
        from rcmstr_fast.ops import selfcheck

        rows = selfcheck.rows()
        print(json.dumps(rows, indent=1) if arguments.json else check_table(rows))
        return int(any(row["reasons"] and not row["missing"] for row in rows))
    from rcmstr_fast.train.environment import environment

    report = environment()
    print(json.dumps(report, indent=1) if arguments.json else text(report))
    return 0


def check_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `selfcheck.rows` for reading."""
    head = f"{'operation':<20} {'backend':<8} {'error':>9} {'eager':>9} {'ms':>8}  (shares of the largest value, against float64)"
    lines = [head]
    for row in rows:
        name = f"{row['operation']:<20} {row['backend']:<8}"
        if row["missing"] or not (row["cases"] or row["reasons"]):
            lines.append(f"{name} not here: {'; '.join(row['reasons']) or 'it can run none of the inputs'}")
            continue
        verdict = f"refused: {'; '.join(row['reasons'])}" if row["reasons"] else "agrees"
        lines.append(f"{name} {row['error']:9.1e} {row['eager']:9.1e} {row['ms']:8.0f}  {verdict}")
    return "\n".join(lines)


def text(report: dict[str, Any]) -> str:
    """The report of `environment` for reading."""
    extension = report["extension"]
    built = "built with CUDA" if extension["cuda"] else "built without CUDA (set RCMSTR_FAST_CUDA=1 to require it)"
    missing = f"not built ({extension.get('reason')}); everything runs, slower"
    rows = [
        ("rcmstr_fast", f"{report['version']}, commit {report['commit'] or 'unknown (no checkout)'}"),
        ("python", f"{report['python']} on {report['platform']}"),
        ("cpu", f"{report['cpu']}, {report['cpus']} usable"),
        *(("gpu", f"{g['name']}, {g['memory_gib']} GiB, compute {g['capability']}") for g in report["gpus"]),
        *([] if report["gpus"] else [("gpu", "none visible")]),
        ("cuda", f"torch built for {report['cuda']}" if report["cuda"] else "torch built without CUDA"),
        ("extension", built if extension["built"] else missing),
        *((name, version or "not installed") for name, version in report["libraries"].items()),
        *((name, report["variables"].get(name, "not set")) for name in env.VARIABLES),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", "operations (first usable backend is taken):"]
    for operation, backends in report["backends"].items():
        usable = [name for name, reasons in backends.items() if not reasons]
        lines.append(f"  {operation:<22}{', '.join(usable)}")
        lines += [f"    not {name}: {'; '.join(reasons)}" for name, reasons in backends.items() if reasons]
    lines += ["", *report.get("choices", [])]
    return "\n".join(lines).rstrip()
