"""The console as an observer: a run and a command go on without it and keep their status."""

import io
import logging
import os
import subprocess
import sys

import pytest

from rcmstr_fast import console
from rcmstr_fast.cli import main as command
from rcmstr_fast.console import Forgiving, forgiving


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_the_first_failure_is_said_once_in_the_log(caplog):
    stream = Forgiving(Broken())
    with caplog.at_level("WARNING"):
        assert stream.write("abc") == 3 and stream.write("d") == 1
        stream.flush()
    assert [r.getMessage() for r in caplog.records] == [
        "the console is gone ([Errno 32] Broken pipe); the work goes on without it"
    ]
    assert not stream.isatty()


def test_the_log_may_come_back_to_the_stream_that_fails():
    stream, kept = Forgiving(Broken()), io.StringIO()
    handlers = [logging.StreamHandler(stream), logging.StreamHandler(kept)]
    logger = logging.getLogger("rcmstr_fast")
    for handler in handlers:
        logger.addHandler(handler)
    try:
        logger.warning("words")
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
    assert sorted(kept.getvalue().splitlines()) == [
        "the console is gone ([Errno 32] Broken pipe); the work goes on without it",
        "words",
    ]


def test_no_stream_a_closed_one_and_foreign_characters():
    nothing = forgiving(None)
    assert forgiving(nothing) is nothing and nothing.write("x") == 1 and not nothing.isatty()
    closed = io.StringIO()
    closed.close()
    assert forgiving(closed).write("x") == 1
    ascii_only = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    Forgiving(ascii_only).write("é\udce9")
    ascii_only.flush()
    assert raw.getvalue() == rb"\xe9\udce9"


def test_streams_are_given_back(monkeypatch):
    before = sys.stdout, sys.stderr
    with console.kept():
        assert isinstance(sys.stdout, Forgiving) and isinstance(sys.stderr, Forgiving)
    with console.kept(strict_output=True):
        assert sys.stdout is before[0] and isinstance(sys.stderr, Forgiving)
    assert (sys.stdout, sys.stderr) == before


WORK = "m._run = lambda *_: [print('x' * 9999, file=f) for f in (sys.stdout, sys.stderr)] and 0;"


@pytest.mark.parametrize(
    "closing", ["1>&-", "2>&-", "1>&- 2>&- 0<&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 | true"]
)
def test_a_command_works_without_its_streams(tmp_path, closing):
    """Closed, full, or a pipe that nobody reads: the status is the command's, and no file takes the place of stderr."""
    code = f"{WORK} s = m.main(['pretrain']); f = open('made', 'w'); f.write(str((s, f.fileno() > 2))); sys.exit(s)"
    full = f"import sys; from rcmstr_fast.cli import main as m; {code}"
    script = f'{sys.executable} -c "{full}" {closing}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "made").read_text() == "(0, True)", done.stderr


def test_a_showing_command_ends_with_its_reader(monkeypatch, capsys):
    def show(name, argv):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command, "_run", show)
    assert command.main(["doctor"]) == 128 + 13 and capsys.readouterr().err == ""
    assert command.main(["pretrain"]) == 2 and "Broken pipe" in capsys.readouterr().err


def test_an_error_without_stderr_keeps_its_status(tmp_path):
    code = "m.main(['pretrain', '--optim.lrr', '1'])"
    script = f'{sys.executable} -c "import sys; from rcmstr_fast.cli import main as m; sys.exit({code})" 2>&-'
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path).returncode == 2


def test_names_that_are_no_utf8_are_printed_as_they_are():
    raw = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from rcmstr_fast.cli import main as m;"
            "m._run = lambda *_: print('donn\\udce9es') or 0; sys.exit(m.main(['doctor']))",
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert raw.stdout == b"donn\xe9es\n"


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    class OutOfMemoryError(RuntimeError):
        """As torch's, by name."""

    errors = {
        MemoryError(): "out of memory",
        OutOfMemoryError("CUDA out of memory.\nTried"): "CUDA out of memory. Tried",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"): "can't allocate memory: you tried",
    }
    for error, words in errors.items():

        def fail(name, argv, error=error):
            raise error

        monkeypatch.setattr(command, "_run", fail)
        assert command.main(["doctor"]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
