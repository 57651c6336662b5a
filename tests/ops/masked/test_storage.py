"""Which stages of a masked pass are computed sparsely: the table, the environment's order, CUDA without a count."""

import pytest
import torch

from rcmstr_fast import env
from rcmstr_fast.ops import Sites, triton_backend
from rcmstr_fast.ops.masked import layers, storage
from rcmstr_fast.ops.masked.lists import ListSites


class OnCuda:
    """Stands for the active map of a stage on a GPU; asking for its values would be a synchronisation."""

    def __init__(self, height, width):
        self.shape, self.device = (2, 1, height, width), torch.device("cuda", 0)


def stages():
    return [Sites(OnCuda(*size), None) for size in ((32, 100), (8, 25), (4, 26))]


def chosen(monkeypatch, visible, table, order=None):
    monkeypatch.setattr(triton_backend, "reasons", list)
    monkeypatch.setitem(storage.LARGEST_PACKED_SHARE, "cuda", table)
    if order is not None:
        monkeypatch.setenv("RCMSTR_FAST_MASKED_STAGES", order)
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)
    return [isinstance(s, ListSites) for s in storage.masked_storage(stages(), visible=visible)]


@pytest.mark.parametrize(
    ("visible", "table", "order", "expected"),
    [
        (0.3, {}, None, [False, False, False]),
        (0.3, {1: 0.5, 1000: 0.2}, None, [False, True, True]),
        (0.6, {1: 0.5}, None, [False, False, False]),
        (None, {1: 0.9}, None, [False, False, False]),
        (0.3, {}, "sparse", [True, True, True]),
        (0.3, {1: 0.9}, "dense", [False, False, False]),
        (0.3, {}, "1:0.4,150:0.1", [False, False, True]),
    ],
)
def test_the_table_chooses_on_cuda_without_asking_the_device(monkeypatch, visible, table, order, expected):
    assert chosen(monkeypatch, visible, table, order) == expected


def test_the_kernels_run_by_themselves_only_on_chosen_stages():
    active = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    plain = Sites(active, None)
    for sites, chosen in ((plain, False), (ListSites.of(plain), False), (ListSites.make(plain), True)):
        avoided = layers.avoid(layers.Layer(torch.ones(1, 1, 2, 2), sites), "triton")
        assert (avoided == []) == chosen


def test_the_order_is_shown_and_a_bad_one_named(monkeypatch):
    assert storage.describe()[1] == (
        "masked pass on cuda: lists of active sites up to an active share of 70% from 1 sites, 0% from 400 sites; "
        "dense x mask above (before a run is tuned)"
    )
    monkeypatch.setenv("RCMSTR_FAST_MASKED_STAGES", "1:0.4")
    assert (
        "40% from 1 sites" in storage.describe()[0] and "ordered by RCMSTR_FAST_MASKED_STAGES" in storage.describe()[1]
    )
    monkeypatch.setenv("RCMSTR_FAST_MASKED_STAGES", "half")
    with pytest.raises(ValueError, match="must be dense, sparse or entries sites:share, got 'half'"):
        env.masked_stages()
    monkeypatch.setenv("RCMSTR_FAST_LOSS_LAUNCH", "twice")
    with pytest.raises(ValueError, match="must be scheduled or separate, got 'twice'"):
        env.loss_launch()
