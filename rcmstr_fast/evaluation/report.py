"""Results as a table (Markdown, readable as plain text), CSV and JSON."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.metrics import METRICS, Score, mean

#: Heads of the metric columns, in the order of `METRICS`; tables print percent.
_HEADS = ("accuracy", "ED1", "1-NED", "CER", "WER")
_NUMBERS = "N kept", "emptied", "N total"


@dataclass(frozen=True)
class SetResult:
    """One test set under one protocol.

    Attributes:
        set: name of the test set.
        protocol: name of the protocol.
        total: labelled words of the set; `score.count` of them are kept.
        dropped: reason -> number of words the protocol leaves out.
        score: the metrics over the kept words.
        emptied: kept words of whose labels the protocol leaves nothing; reading nothing reads them.
        broken: kept words whose picture cannot be decoded; misread.
        unreadable: kept words with a character that the decoder does not have.
        beyond_ctc: kept words that no CTC path over the frames of the encoder spells.
    """

    set: str
    protocol: str
    total: int
    dropped: dict[str, int]
    score: Score
    emptied: int = 0
    broken: int = 0
    unreadable: int = 0
    beyond_ctc: int = 0


@dataclass(frozen=True)
class RunResult:
    """Everything one evaluated model is reported with.

    Attributes:
        model: its name in tables.
        sets: the results.
        info: facts to keep beside them (encoder, decoder, mode, words trained on, best step, ...).
    """

    model: str
    sets: list[SetResult]
    info: dict = field(default_factory=dict)


def _percent(score: Score) -> list[str]:
    return [f"{100 * getattr(score, name):.2f}" for name in METRICS]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """A Markdown table with aligned columns, the first `left` of them to the left."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(lines)


def _protocols(results: Iterable[SetResult]) -> list[str]:
    return list(dict.fromkeys(result.protocol for result in results))


def _summary(results: Sequence[SetResult]) -> list[tuple[str, int, int, Score]]:
    """(name, emptied, N total, metrics) of the two mean rows."""
    scores = [result.score for result in results]
    total, empty = sum(result.total for result in results), sum(result.emptied for result in results)
    return [("mean", empty, total, mean(scores)), ("weighted mean", empty, total, mean(scores, weighted=True))]


def _lines(result: RunResult) -> list[tuple[str, str, int, int, Score]]:
    """(set, protocol, emptied, N total, metrics) of every set, then of the means, protocol by protocol."""
    lines = []
    for protocol in _protocols(result.sets):
        sets = [s for s in result.sets if s.protocol == protocol]
        lines += [(s.set, protocol, s.emptied, s.total, s.score) for s in sets]
        lines += [(name, protocol, empty, total, score) for name, empty, total, score in _summary(sets)]
    return lines


def table(result: RunResult) -> str:
    """One line a set and protocol: N kept, emptied, N total and the metrics in percent; then the means.

    They are the mean over sets and the mean weighted by N kept.
    """
    rows = [
        [name, protocol, score.count, empty, total, *_percent(score)]
        for name, protocol, empty, total, score in _lines(result)
    ]
    return markdown(["set", "protocol", *_NUMBERS, *(f"{head} %" for head in _HEADS)], rows, left=2)


def words_table(result: RunResult) -> str:
    """What became of every word: kept and left out by reason add up to the total; empty where it is not known."""
    parts = result.info.get("words", {})
    rows = [
        (name, entry["total"], entry["kept"], ", ".join(f"{n} {reason}" for reason, n in entry["dropped"].items()), "")
        for name, entry in parts.items()
    ]
    for found in result.sets:
        left_out = ", ".join(f"{n} {reason}" for reason, n in found.dropped.items())
        notes = {
            "with an emptied label": found.emptied,
            "broken": found.broken,
            "with characters outside the charset": found.unreadable,
            "beyond CTC": found.beyond_ctc,
        }
        noted = ", ".join(f"{n} {what}" for what, n in notes.items() if n)
        rows.append((f"{found.set} ({found.protocol})", found.total, found.score.count, left_out, noted))
    return markdown(["words", "N total", "N kept", "left out", "of the kept"], rows) if parts else ""


def full_table(result: RunResult) -> str:
    """The table and, where it is known, what became of every word."""
    return "\n\n".join(part for part in (table(result), words_table(result)) if part)


def to_csv(results: Sequence[RunResult]) -> str:
    """The same lines as comma-separated values, fractions instead of percent, with a column for the model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "set", "protocol", "n_kept", "n_emptied", "n_total", *METRICS])
    for result in results:
        for name, protocol, empty, total, score in _lines(result):
            values = [f"{getattr(score, metric):.6f}" for metric in METRICS]
            writer.writerow([result.model, name, protocol, score.count, empty, total, *values])
    return out.getvalue()


def to_json(result: RunResult) -> str:
    """The whole result with the means; `from_json` reads it back."""
    means = {
        protocol: {
            name.replace(" ", "_"): asdict(score)
            for name, _, _, score in _summary([s for s in result.sets if s.protocol == protocol])
        }
        for protocol in _protocols(result.sets)
    }
    return json.dumps(asdict(result) | {"means": means}, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> RunResult:
    """Read `to_json`'s text.

    Raises:
        ConfigError: it is something else.
    """
    try:
        fields = json.loads(text)
        sets = [SetResult(**(entry | {"score": Score(**entry["score"])})) for entry in fields["sets"]]
        return RunResult(fields["model"], sets, fields["info"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"expected the results.json of an evaluation run, got {text[:40]!r} ({error})") from error


def load_result(run: str | Path) -> RunResult:
    """The results of a finished run folder (or of its results.json).

    Raises:
        ConfigError: there are none.
    """
    path = Path(run)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"expected a finished evaluation run with results.json, got {run}")
    return from_json(path.read_text(encoding="utf-8"))
