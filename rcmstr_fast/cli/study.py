"""`rcmstr study`: many pretrainings x evaluations x seeds from one file; what is done already is not done again."""

import json
from pathlib import Path

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.fields import Bounds

NAME = "study"
HELP = "run a list of pretrainings x evaluations x seeds and report them; run it again to continue"


def add_arguments(parser: Parser) -> None:
    """The study, where it runs, and its data."""
    parser.add_argument("study", type=str, help="a study: YAML file, or the name of one that comes with the package")
    parser.add_argument("--out", type=str, default="", help="folder of the study; empty: runs/NAME")
    parser.add_argument("--data", type=dict[str, str], default={}, help="paths of its data: --data '{words: PATH}'")
    parser.add_argument(
        "--jobs", type=int, default=1, bounds=Bounds(low=1, high=1024), help="commands at the same time"
    )
    parser.add_argument("--only", type=list[str], default=[], help="only these rows: --only A B")
    parser.words = ("--only",)
    parser.add_argument("--record", type=str, default="", help="also write what was found to this JSON file")
    parser.add_argument("--known", type=str, default="", help="take results over from this record, or a folder of them")
    parser.add_argument("--plan", type=bool, default=False, help="only print the commands that are left")


def run(arguments: Namespace) -> int:
    """Run what is left; 1 where a command failed."""
    from rcmstr_fast.recipe_files import find
    from rcmstr_fast.study.page import runs_of, write_page
    from rcmstr_fast.study.plan import cells, read_study
    from rcmstr_fast.study.records import known_results, study_record
    from rcmstr_fast.study.run import console_log, data_paths, of_rows, read_record, run_study, to_run
    from rcmstr_fast.train.checkpoint import write_text

    study = read_study(find(arguments.study, "studies"))
    folder = Path(arguments.out or f"runs/{study.name}")
    planned = cells(study, folder, data_paths(study, folder, arguments.data), find)
    known = known_results(Path(arguments.known), planned) if arguments.known else {}
    evaluated = [cell.id for cell in planned if cell.evaluation and cell.id in known]
    if arguments.plan:
        left = [
            c for c in to_run(of_rows(study, planned, arguments.only), evaluated) if read_record(folder, c.id) is None
        ]
        print("\n".join("rcmstr " + " ".join(c.arguments()) for c in left))
        return 0

    def report() -> None:
        record = study_record(study, folder, planned, known)
        write_page(record, runs_of(planned, folder), folder / "report.html")
        if arguments.record:
            out = Path(arguments.record)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    with console_log():
        outcome = run_study(
            study,
            folder,
            arguments.data,
            recipe=find,
            jobs=arguments.jobs,
            only=arguments.only,
            known=evaluated,
            report=report,
        )
    report()
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"page: {folder / 'report.html'}")
    for cell, said in outcome.failed.items():
        print(f"failed: {cell}: {said}")
    return int(bool(outcome.failed))
