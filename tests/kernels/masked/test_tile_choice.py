"""The tiles of the masked convolution as a choice: what is tried where, what holds, and what a wrong one comes to."""

from types import SimpleNamespace

import pytest
import torch

from rcmstr_fast.ops import check_cases, masked, selfcheck, triton_backend
from rcmstr_fast.ops.tile_choice import read, write
from rcmstr_fast.train import tuned
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Setting

pytest.importorskip("triton")
from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.architectures import FAMILIES, KNOWN
from rcmstr_fast.kernels.masked import conv, tiles

pytestmark = pytest.mark.skipif(bool(triton_backend.reasons()), reason="triton cannot run here")
ROWS, WEIGHT = masked.TILES
TABLES = {ROWS.name: tiles.ROWS, WEIGHT.name: tiles.WEIGHT}
ON_GPU = Setting("cuda", stages=((8, 25), (4, 26)), visible=0.3)


def fake(monkeypatch, family):
    """A GPU of a family."""
    monkeypatch.setattr(runtime, "architecture", lambda device: family)
    monkeypatch.setattr(triton_backend, "reasons", lambda: [])


@pytest.mark.parametrize("choice", masked.TILES, ids=lambda choice: choice.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_tried_where_a_gpu_runs_a_masked_pass(monkeypatch, choice, family):
    fake(monkeypatch, family)
    found = choice.candidates(ON_GPU)
    assert len(found) == len(set(found)) >= 3 and found[0] == choice.prior(ON_GPU)
    assert all(write(*read(value, tiles.WIDE)) == value for value in found)
    limit = max(one.shared for one in KNOWN.values() if one.family == family)
    key, own = read(found[0], tiles.WIDE)
    assert TABLES[choice.name][key] == own
    assert 2 * own.block_k * (own.block_m + own.block_n) * (own.num_stages - 1) <= limit
    for other in (Setting("cpu", stages=ON_GPU.stages, visible=0.3), Setting("cuda")):
        assert choice.candidates(other) == [] and choice.prior(other) == ""
    monkeypatch.setattr(triton_backend, "reasons", lambda: ["there is no CUDA GPU"])
    assert choice.candidates(ON_GPU) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tile_holds_for_wide_layers_while_it_is_chosen(monkeypatch, family):
    fake(monkeypatch, family)
    before = tiles.tile(family, 512, 512, 2), tiles.weight_tile(family, 512, 512, 2)
    chosen = {choice.name: choice.candidates(ON_GPU)[-1] for choice in masked.TILES}
    with choices.using(chosen):
        held = tiles.tile(family, 512, 512, 2), tiles.weight_tile(family, 512, 512, 2)
    assert held[0] == read(chosen[ROWS.name], tiles.WIDE)[1] != before[0]
    wanted = read(chosen[WEIGHT.name], tiles.WIDE)[1]
    assert (held[1].block_m, held[1].block_n, held[1].block_k) == (wanted.block_m, wanted.block_n, wanted.block_k)
    assert before == (tiles.tile(family, 512, 512, 2), tiles.weight_tile(family, 512, 512, 2))


def small_case():
    """A case of the self-check whose output takes the widest entry of the table, small enough for the interpreter."""
    case = next(c for c in check_cases.CASES["masked_conv_norm"]() if c.device == "")
    return [
        check_cases.Case(
            "small", check_cases._masked_inputs(2, 17, 70, (4, 7)), case.call, case.leaves, (torch.bfloat16,)
        )
    ]


def maker(choice, value):
    trial = SimpleNamespace(run=lambda choice, value: "timed")
    return tuned._maker(trial, choice, value)


@pytest.mark.parametrize("choice", masked.TILES, ids=lambda choice: choice.name)
def test_another_tile_agrees_and_a_wrong_one_is_never_timed(monkeypatch, choice):
    monkeypatch.setattr(selfcheck, "CASES", {"masked_conv_norm": small_case})
    key = (80, 128)  # the interpreter takes family 80
    other = tiles.ConvTile(64, 64, 32, 4, 2)
    assert maker(choice, write(key, other))() == "timed"
    name = "masked_conv" if choice is ROWS else "masked_conv_weight"
    right = getattr(conv, name)

    def wrong(*args, **options):
        found = right(*args, **options)
        held = TABLES[choice.name][key] == other
        return found.mul_(3) if held else found

    monkeypatch.setattr(conv, name, wrong)
    with pytest.raises(RuntimeError, match=r"it disagrees with the reference: small, bfloat16: .* has an error of"):
        maker(choice, write(key, other))()
    assert maker(choice, write(key, TABLES[choice.name][key]))() == "timed"


def test_a_case_of_the_self_check_takes_the_tile_that_is_chosen():
    """It runs on a GPU only, where it is what checks a candidate."""
    (wide,) = [case for case in check_cases.CASES["masked_conv_norm"]() if case.device == "cuda"]
    weight = wide.make()["weight"]
    for family in FAMILIES:
        assert min(weight.shape[:2]) >= max(n for known, n in tiles.ROWS if known == family)
    assert wide.dtypes == (torch.bfloat16,)  # other dtypes do not take their tiles from the table
