"""permute_strips, restore_frames, draw_order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import array, cases, normal
from tests.oracles import strips

strip_cases = cases()
order_cases = cases()
ALL_24 = [torch.tensor(p).view(2, 2) for p in itertools.permutations(range(4))]


def column_features(images, frames):
    """Equivariant features: a frame sees its own columns only, [B, C, H, W] -> [B, T, 2 C]."""
    columns = images.unflatten(3, (frames, -1))
    return torch.cat([columns.mean(dim=(2, 4)), columns.square().amax(dim=(2, 4))], dim=1).transpose(1, 2)


@strip_cases
@pytest.mark.parametrize("order", ALL_24, ids=lambda order: "".join(map(str, order.flatten().tolist())))
def test_restoring_undoes_all_24_orders(case, order):
    order = order.to(case.device)
    images = normal(2, 3, 4, 104, seed=0, dtype=torch.float32, device=case.device)
    shape = {"num_patches": 2, "group_size": 2}
    permuted = case(ops.permute_strips, images, order, **shape)
    restored = case(ops.restore_frames, column_features(permuted, 26), order, **shape)
    assert torch.equal(restored, column_features(images, 26))
    assert torch.equal(permuted, images) == (order.flatten().tolist() == [0, 1, 2, 3])


@strip_cases
@settings(max_examples=20, deadline=None)
@given(b=st.integers(0, 7), n=st.integers(1, 4), m=st.integers(1, 4), w=st.integers(1, 3), seed=st.integers(0, 99))
def test_strips_match_the_oracle(case, b, n, m, w, seed):
    index = torch.arange(b, device=case.device)
    order = ops.draw_order(index, seed=seed, epoch=0, num_patches=n, group_size=m)
    images = torch.arange(b * 6 * n * w, device=case.device).view(b, 3, 2, n * w).to(torch.uint8)
    permuted = case(ops.permute_strips, images, order, num_patches=n, group_size=m)
    assert (array(permuted) == strips.permute(array(images), array(order))).all()
    assert permuted.dtype == torch.uint8


@strip_cases
def test_memory_format_is_kept_and_gradients_flow(case):
    images = normal(2, 3, 4, 8, seed=0, dtype=torch.float64, device=case.device)
    order, shape = ALL_24[9].to(case.device), {"num_patches": 2, "group_size": 2}
    nhwc = images.to(memory_format=torch.channels_last)
    permuted = case(ops.permute_strips, nhwc, order, **shape)
    assert permuted.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(permuted, case(ops.permute_strips, images, order, **shape))
    frames = normal(2, 6, 2, seed=0, dtype=torch.float64, device=case.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: case(ops.restore_frames, x, order, **shape), (frames,))


@order_cases
@settings(max_examples=20, deadline=None)
@given(b=st.integers(0, 9), n=st.integers(1, 4), m=st.integers(1, 4))
def test_orders_permute_inside_full_groups(case, b, n, m):
    index = torch.arange(100, 100 + b, device=case.device)
    order = case(ops.draw_order, index, seed=1, epoch=2, num_patches=n, group_size=m)
    identity = torch.arange(b * n, device=case.device)
    full = b // m * m * n
    assert order.shape == (b, n) and order.dtype == torch.int64
    assert torch.equal(order.flatten().sort().values, identity)
    assert torch.equal(order.flatten() // (n * m), identity // (n * m))
    assert torch.equal(order.flatten()[full:], identity[full:]), "an incomplete group stays as it is"


@order_cases
def test_orders_are_keyed_by_seed_epoch_and_first_index(case):
    index = torch.arange(40, device=case.device)

    def draw(index=index, seed=1, epoch=0, shared=False):
        return case(ops.draw_order, index, seed=seed, epoch=epoch, num_patches=2, group_size=2, shared=shared)

    order = draw()
    assert torch.equal(order, draw())
    assert not torch.equal(order, draw(seed=2)) and not torch.equal(order, draw(epoch=1))
    assert torch.equal(draw(index[10:20]), order[10:20] - 20), "a group does not depend on the rest of the batch"
    later = index.clone()
    later[1::2] += 1000
    assert torch.equal(draw(later), order), "only the first index of a group counts"
    local = draw(shared=True).view(20, 4) % 4
    assert (local == local[0]).all() and torch.equal(local[0], order.view(20, 4)[0])
    assert len({tuple(row) for row in (order.view(20, 4) % 4).tolist()}) > 5


@order_cases
def test_all_24_orders_are_equally_likely(case):
    index = torch.arange(2 * 24 * 200, device=case.device)
    order = case(ops.draw_order, index, seed=3, epoch=0, num_patches=2, group_size=2)
    codes = (order.view(-1, 4) % 4) @ torch.tensor([64, 16, 4, 1], device=case.device)
    counts = codes.unique(return_counts=True)[1].double()
    assert len(counts) == 24
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 49.7  # 0.999 quantile at 23 degrees of freedom


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda o: ops.permute_strips(torch.zeros(2, 3, 4, 9), o, num_patches=2, group_size=2),
            ValueError,
            "permute_strips: num_patches must divide the width 9, got 2",
        ),
        (
            lambda o: ops.permute_strips(torch.zeros(2, 3, 4, 8), o[:1], num_patches=2, group_size=2),
            ValueError,
            "permute_strips: order must be [2, 2] like images and num_patches, got [1, 2]",
        ),
        (
            lambda o: ops.permute_strips(torch.zeros(3, 4, 8), o, num_patches=2, group_size=2),
            ValueError,
            "permute_strips: images must be [B, C, H, W], got [3, 4, 8]",
        ),
        (
            lambda o: ops.restore_frames(torch.zeros(2, 25, 8), o, num_patches=2, group_size=2),
            ValueError,
            "restore_frames: num_patches must divide the number of frames 25, got 2",
        ),
        (
            lambda o: ops.restore_frames(torch.zeros(2, 26, 8), o.float(), num_patches=2, group_size=2),
            TypeError,
            "restore_frames: order must be an int64 tensor [2, 2], got torch.float32",
        ),
        (
            lambda o: ops.restore_frames(torch.zeros(2, 26, 8), o, num_patches=2, group_size=0),
            ValueError,
            "restore_frames: group_size must be above 0, got 0",
        ),
        (
            lambda o: ops.draw_order(o, seed=0, epoch=0, num_patches=2, group_size=2),
            ValueError,
            "draw_order: index must be [B], got [2, 2]",
        ),
        (
            lambda o: ops.draw_order(o[0], seed=0, epoch=0, num_patches=0, group_size=2),
            ValueError,
            "draw_order: num_patches must be above 0, got 0",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call(ALL_24[0])
    assert str(caught.value) == message


def test_debug_checks_the_order(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_DEBUG", "1")
    images = torch.zeros(4, 3, 2, 8)
    inside = torch.tensor([[1, 0], [2, 3], [6, 7], [5, 4]])
    ops.permute_strips(images, inside, num_patches=2, group_size=2)
    for order in (torch.zeros_like(inside), inside.flip(0)):
        with pytest.raises(ValueError, match="permute_strips: order must permute the strips of each group of 2"):
            ops.permute_strips(images, order, num_patches=2, group_size=2)
    ops.hierarchical_pool(torch.zeros(4, 8, 2), 4, order=inside.flip(0))
