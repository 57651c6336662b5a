import subprocess
import sys
import time

import pytest

import rcmstr_fast
from rcmstr_fast.cli import main as command
from rcmstr_fast.cli.main import available, main, parser_of
from rcmstr_fast.config import RunError


def test_help_lists_what_is_there(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in available()) and "pretrain" in available()
    assert main([]) == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert rcmstr_fast.__version__ in capsys.readouterr().out


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from rcmstr_fast.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 10  # 0.3 s alone; the machine may be busy


def test_unknown_command_offers_the_nearest(capsys):
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err == "rcmstr: unknown command pretrian; did you mean pretrain?\n"
    assert main(["xyz"]) == 2
    assert "expected one of " in capsys.readouterr().err


def test_known_errors_are_one_line(monkeypatch, capsys):
    from rcmstr_fast.ops.dispatch import BackendError

    errors = {
        OSError(28, "No space left on device", "/run/x"): (2, "/run/x: No space left on device"),
        RunError("stopped\nby SIGTERM", 143): (143, "stopped by SIGTERM"),
        BackendError("enqueue_: no backend"): (2, "enqueue_: no backend"),
    }
    for error, (status, text) in errors.items():

        def fail(name, argv, error=error):
            raise error

        monkeypatch.setattr(command, "_run", fail)
        assert main(["doctor"]) == status
        assert capsys.readouterr().err == f"rcmstr doctor: {text}\n"


def test_interrupt_is_quiet_and_bugs_keep_their_traceback(monkeypatch, capsys):
    def interrupt(name, argv):
        raise KeyboardInterrupt

    def bug(name, argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr(command, "_run", interrupt)
    assert main(["doctor"]) == 130 and capsys.readouterr().err == ""
    monkeypatch.setattr(command, "_run", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_errors_name_the_process_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert main(["pretrain", "--sed", "1"]) == 2
    assert capsys.readouterr().err == "rcmstr pretrain (rank 3): unknown field sed; did you mean seed?\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--only", "A"], ["A"]),
        (["--only", "A", "B, 600 steps"], ["A", "B, 600 steps"]),
        (["--only", "[A, 'B, 600 steps']"], ["A", "B, 600 steps"]),
        (["--only=[A]"], ["A"]),
        (["--only", "[A]", "--jobs", "3"], ["A"]),
        ([], []),
    ],
)
def test_a_list_of_words_may_be_written_as_words(given, expected):
    found = parser_of("study", []).parse_args(["tiny_table1_cnn", *given])
    assert found.only == expected and found.study == "tiny_table1_cnn"
    found = parser_of("study", []).parse_args([*given, "--jobs", "2", "tiny_table1_cnn"])
    assert found.only == expected
