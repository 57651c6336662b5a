"""Rendering in processes, called from a script of the user's."""

import subprocess
import sys
from pathlib import Path

import pytest

from rcmstr_fast.data.synth import font_files

pytest.importorskip("fontTools", reason="the synth extra is not installed")
pytest.importorskip("matplotlib", reason="the synth extra is not installed")

SCRIPT = """
from rcmstr_fast.data.synth import SynthConfig, render_lmdb
import sys
print("imported", flush=True)
{guard}
    out, fonts, words = sys.argv[1:]
    render_lmdb(SynthConfig(out=out, fonts=fonts, words=words, system_fonts=False, count=600, processes=2))
    print("done", flush=True)
"""


@pytest.fixture
def request_files(tmp_path) -> list[str]:
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    source = next(path for path in font_files("", True) if path.stem == "DejaVuSans")
    (fonts / source.name).write_bytes(source.read_bytes())
    words = tmp_path / "words.txt"
    # More than a pipe holds: a parent that writes them to a child which is dead already would wait for ever.
    words.write_text("\n".join(f"street{i}" for i in range(20_000)))
    return [str(tmp_path / "out"), str(fonts), str(words)]


def run(tmp_path: Path, guard: str, arguments: list[str]) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120)


def test_a_script_without_a_guard_ends_with_one_clear_line(tmp_path, request_files):
    done = run(tmp_path, "if True:", request_files)
    assert done.returncode == 1 and "done" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "RunError: data synth: a rendering process died" in last and "if __name__ == '__main__':" in last
    assert "bootstrapping" not in done.stderr
    assert not Path(request_files[0]).exists() and not list(tmp_path.glob(".out.partial*"))


def test_a_script_with_a_guard_renders(tmp_path, request_files):
    done = run(tmp_path, "if __name__ == '__main__':", request_files)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
    assert (tmp_path / "out" / "data.mdb").exists()
