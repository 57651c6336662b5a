"""`rcmstr probe`, `finetune` and `read` as a user types them."""

import yaml

from rcmstr_fast.cli.main import main
from rcmstr_fast.evaluation.report import load_result
from tests.evaluation.rendered import digits, picture, tiny_config


def arguments(root, *more):
    """The tiny probe as command line arguments."""
    tiny_config(root)
    return [
        "--run", str(root / "run"), "--encoder", "random", "--model.width", "0.25", "--model.image_width", "36",
        "--train", f"[{root / 'train'}]", "--test", f"[digits={root / 'test'}]", "--augment", "none", "--steps", "1",
        "--batch_size", "8", "--device", "cpu", *more,
    ]  # fmt: skip


def test_probe_then_read(tmp_path, capsys):
    assert main(["probe", *arguments(tmp_path, "--protocols", "[exact,dig36]")]) == 0
    out = capsys.readouterr().out
    assert "| digits" in out and "dig36" in out and "weighted mean" in out
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["protocols"] == ["exact", "dig36"] and config["mode"] == "frozen"

    files = []
    for i, text in enumerate(digits(3, 9)):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(picture(text))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = [str(file) for file in files]
    assert main(["read", *images, "--recogniser", str(tmp_path / "run"), "--device", "cpu"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == images
    assert all(len(line) == 3 and 0 <= float(line[2]) <= 1 for line in lines)
    assert main(["read", str(tmp_path / "bad.png"), images[0], "--recogniser", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    assert "bad.png" in captured.err and captured.out.startswith(images[0])


def test_config_file_is_rerunnable(tmp_path, capsys):
    assert main(["finetune", *arguments(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert load_result(tmp_path / "run").info["mode"] == "finetune"
    assert main(["finetune", "--config", str(tmp_path / "run/config.yaml")]) == 0
    assert capsys.readouterr().out == first


def test_errors_are_one_line(tmp_path, capsys):
    for more, message in (
        (["--lrr", "1"], "unknown field lrr; did you mean lr?"),
        (["--mode", "thaw"], "mode"),
        (["--encoder", str(tmp_path / "no")], "no"),
        (["--subset", "0"], "subset must be more than 0 and at most 1, got 0"),
    ):
        assert main(["probe", *arguments(tmp_path, *more)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and error.startswith("rcmstr probe: ") and message in error
    assert main(["read", "x.png", "--recogniser", str(tmp_path / "no")]) == 2
    assert "recogniser must be" in capsys.readouterr().err


def test_help_shows_meaning_and_default(capsys):
    for command, mode in (("probe", "frozen"), ("finetune", "finetune")):
        try:
            main([command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "share of the training words that is used" in shown
        assert f"default: {mode})" in shown
