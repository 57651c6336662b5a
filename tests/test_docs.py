"""What the documents say of the code is true: variables, recipes, links, commands."""

import re
from pathlib import Path

import pytest
import yaml

from rcmstr_fast import env
from rcmstr_fast.cli.main import available

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_environment_variable_is_listed_and_read_in_one_file():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(RCMSTR_FAST_\w+)`", page, re.M)) == set(env.VARIABLES)
    for path in (ROOT / "rcmstr_fast").rglob("*.py"):
        if path.name != "env.py":
            assert not re.search(r"environ[\[.].*RCMSTR_FAST_", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^rcmstr (\w+)", text, re.M)) <= set(available())
    for name in re.findall(r"recipes/(\w+\.yaml)", text):
        assert (ROOT / "recipes" / name).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid_and_named_in_their_own_comment(path):
    from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining
    from rcmstr_fast.config import resolve

    parser = Parser(prog="rcmstr pretrain")
    add_pretraining(parser, ["--config", str(path)])
    config = to_pretraining(parser.instantiate(parser.parse_args(["--config", str(path)])))
    resolve(config)
    text = path.read_text(encoding="utf-8")
    assert f"recipes/{path.name}" in text.splitlines()[0]
    assert config.method.name == yaml.safe_load(text)["method"]["name"]


def test_table_one_rows_switch_one_module_after_the_other():
    def method(name):
        return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))["method"]

    for arch in ("cnn", "vit"):
        assert method(f"{arch}_seqmoco") == {"name": "seqmoco"}
        ere = {"name": "rclstr", "levels": ["subword"], "permute": True, "inter": "none"}
        assert method(f"{arch}_ere") == ere
        assert method(f"{arch}_ere_intra") == {"name": "rclstr", "inter": "none"}
        assert method(f"{arch}_rclstr") == {"name": "rclstr"}
        assert method(f"{arch}_rcmstr") == {"name": "rcmstr"}
    assert method("cnn_seqmoco_nokl") == {"name": "seqmoco", "kl": False}


def test_promises_name_tests_that_there_are():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## ")[0].splitlines() if line.startswith("| ")][1:]
    assert rows
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", row)
        assert named, row
        for file, names in named:
            there = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M)
            assert set(re.findall(r"`(test_\w+)`", names)) <= set(there), (file, names)
