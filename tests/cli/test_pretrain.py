import dataclasses
from dataclasses import asdict

import pytest

from rcmstr_fast.cli import pretrain as command
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods import settings
from rcmstr_fast.train import loop


@pytest.fixture
def parsed(monkeypatch):
    """main([...]) without the training: the configuration it would run."""
    seen = []
    monkeypatch.setattr(loop, "pretrain", seen.append)

    def run(*argv) -> PretrainConfig:
        assert main(["pretrain", *argv]) == 0
        return seen[-1]

    return run


def test_file_then_flags(parsed, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: paper\noptim: {lr: 0.5, clip: 1.0}\ndata: {roots: [a, b]}\n")
    config = parsed("--config", str(recipe), "--optim.lr", "0.25", "--method.levels", "[frame,word]")
    assert (config.preset, config.optim.lr, config.optim.clip) == ("paper", 0.25, 1.0)
    assert config.data.roots == ["a", "b"] and config.method.levels == ["frame", "word"]
    assert asdict(parsed()) == asdict(PretrainConfig(method=settings("rcmstr")))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--optim.lrr", "3"], "unknown field optim.lrr; did you mean optim.lr?"),
        (["--method.taukl=3"], "unknown field method.taukl; did you mean method.tau_kl?"),
        (["--tau_info", "3"], "unknown field tau_info; did you mean method.tau_info?"),
        (["--qqqq", "3"], "unknown field qqqq; --help lists the fields"),
        (["--optim.l", "3"], "unknown field optim.l; did you mean optim.lr?"),
        (["--optim.lr", "abc"], "optim.lr: expected float or null, got abc"),
        (["--seed", "0.5"], "seed: expected int, got 0.5"),
        (["--data.roots", "folder"], "expected a folder of images or LMDBs, got folder, which does not exist"),
        (["--data.weights", "2"], "data.weights: expected list, got 2; write [2]"),
        (["--model.width", "0.3", "--data.roots", "[x]"], "model.width must be 0.125, 0.25, 0.5 or 1, got 0.3"),
        (["--method.name", "rclstr", "--method.mask_ratioo", "1"], "unknown field method.mask_ratioo; did you mean"),
        (["--method.name", "rclst"], "method.name must be one of"),
        (["--method.name=seqmoco", "--method.queue_size=0"], "method.queue_size must be at least 1, got 0"),
        ([], "data.roots must name at least one folder of images or LMDB, got []"),
    ],
)
def test_wrong_arguments_are_one_line(argv, line, capsys, tmp_path):
    assert main(["pretrain", "--run", str(tmp_path / "run"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rcmstr pretrain: {line}") and error.count("\n") == 1
    assert error == f"rcmstr pretrain: {line}\n" or "--method.name" in argv[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  lrr: 3\n", "unknown field optim.lrr; did you mean optim.lr?"),
        ("optimm:\n  lr: 3\n", "unknown field optimm.lr; did you mean optim.lr?"),
        ("presett: paper\n", "unknown field presett; did you mean preset?"),
        ("preset: papre\n", "preset: expected one of 'paper', 'rclstr_code', 'fast', got papre"),
        ("optim:\n  lr: [3\n", "Problems parsing config"),
        ("hello\n", "Unexpected config"),
    ],
)
def test_wrong_files_are_one_line(text, words, capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["pretrain", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_missing_file_is_one_line(capsys):
    assert main(["pretrain", "--config", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert "nowhere.yaml" in error and error.count("\n") == 1


def test_help_shows_meaning_and_default_of_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    page = capsys.readouterr().out
    flat = " ".join(page.split())
    config = PretrainConfig(method=settings("rcmstr"))
    for part in ("data", "model", "method", "optim", "train"):
        for field in dataclasses.fields(getattr(config, part)):
            assert f"--{part}.{field.name} " in flat, field.name
    assert "weight of loss_rcl beside loss_mim; at least 0. (type: float, default: 0.1)" in flat
    assert command.HELP in flat


def test_every_recipe_parses(parsed):
    from pathlib import Path

    recipes = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
    methods = [path for path in recipes if "rcmstr pretrain" in path.read_text()]
    assert methods
    for path in methods:
        assert isinstance(parsed("--config", str(path), "--data.roots", "[x]"), PretrainConfig), path


def test_a_field_of_another_method_is_named(capsys):
    assert main(["pretrain", "--method.name", "rclstr", "--method.mask_ratio", "0.5"]) == 2
    error = capsys.readouterr().err
    having = "method dig, ibot, maskocr, persec, rcmstr, simmim has"
    start = f"rcmstr pretrain: method rclstr has no field mask_ratio ({having}); expected one of "
    assert error.startswith(start) and "alpha" in error and error.count("\n") == 1


def test_help_has_the_fields_of_the_named_method_only(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: {name: seqmoco}\n")
    for argv in (["--method.name", "seqmoco"], ["--config", str(recipe)]):
        with pytest.raises(SystemExit):
            main(["pretrain", *argv, "--help"])
        page = capsys.readouterr().out
        assert "--method.queue_size " in page and "--method.mask_ratio " not in page


def test_the_list_of_methods(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["method", "encoders"]
    row = next(line for line in lines if line.startswith("rcmstr "))
    assert "cnn, vit" in row and "queue" in row and "tiny_vit_rcmstr" in row
