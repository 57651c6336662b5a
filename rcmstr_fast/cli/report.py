"""`rcmstr report`: one page of several runs, or of a study."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.config import ConfigError

NAME = "report"
HELP = "one page (HTML, Markdown, CSV, LaTeX) of several runs or of a study"


def add_arguments(parser: ArgumentParser) -> None:
    """What to report, and where."""
    parser.add_argument("runs", type=str, nargs="+", help="run folders of pretrainings and evaluations, or one study")
    parser.add_argument("--out", type=str, default="report.html", help="the HTML file; .md, .csv, .tex lie beside it")
    parser.add_argument("--study-folder", type=str, default="", help="where the study ran; empty: runs/NAME")


def run(arguments: Namespace) -> int:
    """Write the page and say where it is."""
    from rcmstr_fast.study.page import Runs, write_page
    from rcmstr_fast.study.records import runs_record

    paths = [Path(run) for run in arguments.runs]
    if len(paths) == 1 and not paths[0].is_dir():
        record, runs = _study(arguments.runs[0], arguments.study_folder)
    else:
        missing = next((path for path in paths if not path.is_dir()), None)
        if missing is not None:
            raise ConfigError(f"expected run folders, or one study, got {missing}")
        record = runs_record(paths)
        pretraining = {p.absolute().name: p for p in paths if (p / "views.png").exists()}
        runs = Runs(pretraining, {p.absolute().name: p for p in paths if p.absolute().name not in pretraining})
    made = write_page(record, runs, Path(arguments.out))
    print(made[1].read_text(encoding="utf-8"))
    print("\n".join(map(str, made)))
    return 0


def _study(name: str, folder: str) -> tuple:
    from rcmstr_fast.recipe_files import find
    from rcmstr_fast.study.page import runs_of
    from rcmstr_fast.study.plan import cells, read_study
    from rcmstr_fast.study.records import study_record

    study = read_study(find(name, "studies"))
    place = Path(folder or f"runs/{study.name}")
    planned = cells(study, place, {data: str(data) for data in study.data}, find)
    return study_record(study, place, planned), runs_of(planned, place)
