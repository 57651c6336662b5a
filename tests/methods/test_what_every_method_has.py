"""The table of what every method has on every encoder; a new method fails here until all of it is there."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from rcmstr_fast.cli.methods import recipes
from rcmstr_fast.methods import CNN, every_method, find
from rcmstr_fast.recipe_files import FOLDER
from tests.golden import curves
from tests.methods import test_every_method as suite

ROOT = Path(__file__).resolve().parents[2]
#: method -> the test that compares its loss with an oracle of its own, in float64 and by loops.
ORACLES = {
    "dig": "test_dig.test_loss_is_the_formula",
    "ibot": "test_ibot.test_losses_are_the_formulas",
    "maskocr": "test_maskocr.test_loss_by_pixels_latents_and_characters",
    "persec": "test_persec.test_loss_by_positions",
    "rclstr": "test_relational_methods.test_loss_is_the_sum_of_its_equations",
    "rcmstr": "test_relational_methods.test_loss_is_the_sum_of_its_equations",
    "rotnet": "test_rotnet.test_loss_by_copies",
    "seqclr": "test_in_batch_methods.test_seqclr_is_its_equation",
    "seqmoco": "test_relational_methods.test_loss_is_the_sum_of_its_equations",
    "siman": "test_siman.test_loss_by_pixels_and_patches",
    "simclr": "test_in_batch_methods.test_simclr_is_nt_xent_of_one_vector_an_image",
    "simmim": "test_simmim.test_loss_is_a_mean_over_hidden_pixels",
    "supervised": "test_supervised.test_loss_by_characters",
}
#: Tests of the suite that every case passes: continuing, accumulation, processes, guard, export, capture, pictures.
SUITE = {
    "test_a_restored_run_goes_on_bit_for_bit",
    "test_recorded_steps_are_direct_ones",
    "test_micro_batches_are_the_whole_batch",
    "test_two_processes_are_one",
    "test_a_bad_step_leaves_nothing_behind",
    "test_the_encoder_is_exported",
    "test_pictures_and_monitors_come_when_asked",
}
METHODS = [spec.name for spec in every_method() if spec.method.__module__.startswith("rcmstr_fast.")]
CASES = list(suite.cases())


def kind(encoder: str) -> str:
    return "cnn" if encoder in CNN else "vit"


def test_every_method_is_in_the_table():
    assert set(ORACLES) == set(METHODS) == {name for name, _ in CASES}
    assert set(CASES) == {(name, e) for name in METHODS for e in find(name).encoders if e in (*CNN, "vit_tiny")}


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_its_loss_has_an_oracle_on_this_encoder(case):
    name, encoder = case
    module, _, test = ORACLES[name].partition(".")
    found = getattr(importlib.import_module(f"tests.methods.{module}"), test)
    source = str([mark.args for mark in getattr(found, "pytestmark", ())])
    only = len({kind(x) for x in find(name).encoders}) == 1
    assert only or encoder in source, f"{ORACLES[name]} does not run on {encoder}"


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_it_has_a_golden_curve(case):
    assert case in curves.CASES and curves.path(*case).is_file()


def test_the_suite_asks_everything_of_every_case():
    assert set(dir(suite)) >= SUITE


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_it_has_a_recipe_of_paper_size_and_a_tiny_one(case):
    name, encoder = case
    for size in ("", "tiny_"):
        found = [x for x in recipes(name) if x.startswith(f"{size}{kind(encoder)}_")]
        assert found, f"no recipe {size}{kind(encoder)}_{name}"
        for stem in found:
            held = yaml.safe_load((FOLDER / f"{stem}.yaml").read_text(encoding="utf-8"))
            assert held["method"]["name"] == name and held["preset"] == ("fast" if size else "paper")


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_recipes_says_what_was_chosen(name):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = text[text.index("## Rows of Table I") : text.index("## Other methods")]
    heads = "\n".join(re.findall(r"^### .*$", text, re.M))
    assert f"(`{name}`" in heads or f"`cnn_{name}`" in rows
