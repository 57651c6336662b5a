"""Calls every operation and its backward once or twice at small odd sizes: the program under compute-sanitizer.

Prints `called NAME` for each. On a GPU the automatic choice is the kernels; on a CPU whatever runs there.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.recipes import configured
from rcmstr_fast import ops
from rcmstr_fast.measure.running import OurStep, exact_or_fast, made_up_batches
from rcmstr_fast.train.distributed import World


def _unit(rows: int, width: int, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, width, device=device), dim=1)


def losses(device: str) -> None:
    """Queue losses with one and two queries, with index maps, alone and all in one launch, at every width."""
    for width in (64, 128, 256, 512):
        query, permuted, key, queue = (_unit(n, width, device) for n in (37, 37, 37, 300))
        leaves = [x.requires_grad_() for x in (query, permuted)]
        ops.relational_loss(leaves[0], key, queue, query_permuted=leaves[1]).loss.backward()
        ops.relational_loss(_unit(5, width, device).requires_grad_(), key[:5], queue, alpha=0.0).loss.backward()
        rows = torch.arange(37, device=device)
        ops.relation_kl(leaves[0], key, queue, query_rows=rows.flip(0), key_rows=rows // 2).backward()
        half = _unit(37, width, device).bfloat16().requires_grad_()
        terms = [
            ops.LossTerm(leaves[0], key, queue, leaves[1], 0.3),
            ops.LossTerm(half, key, queue, leaves[1], 0.3),
            ops.LossTerm(leaves[0], key, queue, kl_only=True, query_rows=rows.flip(0), key_rows=rows // 2),
        ]
        for launch in ("scheduled", "separate"):
            torch.stack([r.loss for r in ops.relational_losses(terms, launch=launch)]).sum().backward()


def masked_layers(device: str) -> None:
    """Sparse convolutions, pools and norms on the stages of a small pyramid, float32 and half precision."""
    index = torch.arange(3, device=device)
    masks = ops.draw_masks(index, seed=0, epoch=0, size=(32, 100), unit="stage3", mask_ratio=0.7, num_blocks=1)
    stages = [(8, 25), (4, 26), (2, 27)]
    # On a GPU the kernels are called even where dense work would be chosen.
    backend = "triton" if device == "cuda" else None
    sites = ops.masked_storage(ops.active_sites(masks.grid, stages), backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        for first in (32, 64):
            x = torch.randn(3, first, 8, 25, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            weight = torch.randn(64, first, 3, 3, device=device, requires_grad=True)
            middle, after = (torch.randn(64, 64, k, k, device=device, requires_grad=True) for k in (3, 2))
            scale, shift = (torch.randn(64, device=device, requires_grad=True) for _ in range(2))
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = ops.masked_conv2d(x, weight, sites[0], padding=1)
                y = ops.masked_batch_norm(y, scale, shift, sites[0], relu=True)
                y = ops.masked_max_pool2d(y, sites[1], kernel_size=2, stride=(2, 1), padding=(0, 1))
                z = ops.masked_batch_norm(y, scale, shift, sites[1], residual=y, relu=True)
                z = ops.masked_conv_norm(z, middle, sites[1], scale, shift, padding=1, residual=y, relu=True)
                z = ops.masked_conv2d(z, after, sites[2], stride=(2, 1), padding=(0, 1))
                out = ops.unpack_sites(z, sites[2])
            out.float().square().sum().backward()


def small_operations(device: str) -> None:
    """Pooling, reconstruction loss, mask tokens, permutation, enqueue, momentum update."""
    order = ops.draw_order(torch.arange(5, device=device), seed=0, epoch=0, num_patches=2, group_size=2)
    frames = torch.randn(5, 26, 48, device=device, requires_grad=True)
    sum(x.square().sum() for x in ops.hierarchical_pool(frames, 4, order=order)).backward()  # type: ignore[union-attr]
    images = torch.rand(5, 3, 32, 100, device=device)
    ops.permute_strips(images, order, num_patches=2, group_size=2)
    ops.restore_frames(frames, order, num_patches=2, group_size=2).sum().backward()
    prediction = torch.randn_like(images, requires_grad=True)
    ops.masked_mse(prediction, images, images[:, :1] < 0.7).backward()
    tokens, learned = torch.randn(3, 37, 70, device=device).bfloat16(), torch.randn(70, device=device)
    hidden, position = torch.rand(3, 37, device=device) < 0.7, torch.randn(37, 70, device=device)
    ops.replace_tokens(tokens.requires_grad_(), learned.requires_grad_(), position, hidden).square().sum().backward()
    queue, pointer = torch.zeros(33, 64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for count in (7, 31, 40):
        ops.enqueue_(queue, pointer, _unit(count, 64, device))
    ops.momentum_update_([queue], [torch.ones_like(queue)], 0.9)


def augmentation(device: str) -> None:
    """Views with every operation, also permuted."""
    images = torch.randint(0, 256, (5, 32, 100, 3), dtype=torch.uint8, device=device)
    index = torch.arange(5, device=device)
    order = ops.draw_order(index, seed=0, epoch=0, num_patches=2, group_size=2)
    for preset in ("pretrain", "light", "none"):
        ops.augment_views(images, seed=0, epoch=0, index=index, num_views=2, size=(32, 100), preset=preset, order=order)
    ops.each_operation(images, seed=0, epoch=0, index=index)


def whole_steps(device: str) -> None:
    """Two training steps of a narrow CNN and of a shallow ViT: whatever else the trainer calls."""
    place = torch.device(device)
    for model in ({"encoder": "resnet29", "width": 0.25}, {"encoder": "vit_tiny", "depth": 1}):
        values = {f"model.{name}": value for name, value in model.items()} | {
            "model.projector_hidden": 64,
            "model.feature_dim": 64,
            "method.queue_size": 300,
            "train.global_batch_size": 6,
            "train.device": device,
            "train.cuda_graph": "off",
        }
        config = configured(values)
        with tempfile.TemporaryDirectory() as folder, exact_or_fast(config, place):
            world = World(place)
            ours = OurStep(config, world, Path(folder) / "run")
            for batches in made_up_batches(config, ours.plan, world, 2):
                ours.step(batches)


def main() -> int:
    """Call everything."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for call in (losses, masked_layers, small_operations, augmentation, whole_steps):
        call(device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"called {call.__name__}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
