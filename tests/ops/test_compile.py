"""The operations inside torch.compile: one graph, the same values and gradients."""

import pytest
import torch

from rcmstr_fast import ops
from tests.ops.cases import assert_near, normal, unit_rows

INDEX = torch.arange(4)
MASK = {"size": (8, 104), "unit": "lattice", "mask_ratio": 0.7, "num_blocks": 1}


def masked_layers(images, weight):
    masks = ops.draw_masks(INDEX, seed=1, epoch=0, **MASK)
    fine, coarse = ops.active_sites(masks.grid, [(8, 104), (4, 52)])
    y = ops.masked_conv2d(images, weight, fine, padding=1)
    y = ops.masked_batch_norm(y, torch.ones(8), torch.zeros(8), fine, relu=True, group_size=2)
    pooled = ops.masked_max_pool2d(y, coarse, kernel_size=2, stride=2)
    return pooled, ops.masked_mse(images, images.detach() / 2, masks.pixels)


def permutation(images):
    order = ops.draw_order(INDEX, seed=1, epoch=0, num_patches=2, group_size=2)
    permuted = ops.permute_strips(images, order, num_patches=2, group_size=2)
    frames = permuted.unflatten(3, (26, 4)).mean(dim=(2, 4)).transpose(1, 2)
    return ops.hierarchical_pool(frames, 4, order=order)


def queue(query, rows):
    rows, pointer, moving = rows.clone(), torch.tensor(7), [torch.ones_like(query)]
    ops.enqueue_(rows, pointer, query)
    ops.momentum_update_(moving, [query.detach()], 0.9)
    loss = ops.relational_loss(query, moving[0], rows, backend="reference").loss
    return loss, rows, pointer, moving[0]


CALLS = {
    masked_layers: lambda: [normal(4, 3, 8, 104, seed=0).float(), normal(8, 3, 3, 3, seed=1).float()],
    permutation: lambda: [normal(4, 3, 8, 104, seed=0).float()],
    queue: lambda: [unit_rows(5, 4, 0).float(), unit_rows(9, 4, 1).float()],
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_one_graph(function):
    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        first, *others = CALLS[function]()
        outputs = run(first.requires_grad_(), *others)
        sum(out.square().sum() for out in outputs if out.requires_grad).backward()
        results.append((*outputs, first.grad))
    for eager, compiled in zip(*results):
        assert_near(compiled, eager, torch.float32)
