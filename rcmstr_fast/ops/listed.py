"""The masked layers as Triton kernels over dense channels_last maps and lists of active sites, as custom operators.

Lists are made on the device without knowing how many sites are active: `positions` holds every site, the active ones
first and among them rows with the same taps together; `count` [1] says how many are active.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.masked_conv import input_map
from rcmstr_fast.ops.reference.masked_norm import group_sizes
from rcmstr_fast.ops.site_rows import _C, Pair, Window


def _views(padded: Tensor, window: Window, size: Pair) -> list[Tensor]:
    """The part of a padded input map that lies under each tap, [B, h, w]."""
    (kh, kw), (sh, sw) = window.kernel, window.stride
    ends = [(size[0] - 1) * sh + 1, (size[1] - 1) * sw + 1]
    return [padded[:, y : y + ends[0] : sh, x : x + ends[1] : sw] for y in range(kh) for x in range(kw)]


def tap_words(source: Tensor, active: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Which taps join active sites, as seen from the outputs and from the inputs.

    Args:
        source: [B, 1, h0, w0] bool; active inputs.
        active: [B, 1, h, w] bool; active outputs.
        window: at most 9 taps.
    Returns:
        [B, h, w] and [B, h0, w0] int32; bit v: tap v has an active partner (0 at inactive sites).
    """
    ph, pw = window.padding
    (h0, w0), size = source.shape[2:], (active.shape[2], active.shape[3])
    bottom, right = (
        max(0, (n - 1) * s + k - p - n0)
        for n, s, k, p, n0 in zip(size, window.stride, window.kernel, window.padding, (h0, w0))
    )
    padded = pad(source[:, 0], (pw, right, ph, bottom))
    outputs, reached = active[:, 0], torch.zeros_like(padded, dtype=torch.int32)
    words = torch.zeros_like(outputs, dtype=torch.int32)
    for tap, (inputs, target) in enumerate(zip(_views(padded, window, size), _views(reached, window, size))):
        joined = (inputs & outputs).to(torch.int32) << tap
        words += joined
        target += joined
    return words, reached[:, ph : ph + h0, pw : pw + w0]


def sorted_rows(active: Tensor, words: Tensor, taps: int) -> list[Tensor]:
    """positions [S], bits [S] and count [1], int32: active sites first, in the order of their words."""
    key = torch.where(active.flatten(), words.flatten(), 1 << taps).to(torch.int16)
    key, order = torch.sort(key, stable=True)
    bits = torch.where(key == 1 << taps, 0, key).to(torch.int32)
    return [order.to(torch.int32), bits, active.sum(dtype=torch.int32).view(1)]


def tap_pairs(words: Tensor, taps: int) -> list[Tensor]:
    """pairs [taps, S] and pair_counts [taps], int32: the outputs that have each tap, in the order of the map."""
    has = (words.flatten()[None, :] >> torch.arange(taps, device=words.device, dtype=torch.int32)[:, None]) & 1
    rank = torch.cumsum(has, dim=1, dtype=torch.int32)
    sites = words.numel()
    place = torch.where(has > 0, rank - 1, sites).long()
    pairs = rank.new_zeros(taps, sites + 1)
    pairs.scatter_(1, place, torch.arange(sites, device=words.device, dtype=torch.int32).expand(taps, sites))
    return [pairs[:, :sites].contiguous(), has.sum(dim=1, dtype=torch.int32)]


def compiled_lists(source: Tensor, active: Tensor, window: Window) -> list[Tensor]:
    """`window_lists` by csrc/sites.h: three launches on a GPU; what lies behind a count is not written."""
    source, active = source.contiguous(), active.contiguous()
    images, taps = active.shape[0], window.taps
    shape = (*source.shape[2:], *active.shape[2:], *window.kernel, *window.stride, *window.padding)

    def room(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=active.device)

    jobs, lists = [], []
    for listed, partner, inverse, pairs in (
        (active, source, False, False),
        (source, active, True, False),
        (active, source, False, True),
    ):
        sites = listed.numel()
        made = [room(taps, sites), room(taps)] if pairs else [room(sites), room(sites), room(1)]
        slots = room(((taps if pairs else 1 << taps) + 1) * max(1, images))
        out = (made[0].data_ptr(), 0 if pairs else made[1].data_ptr(), made[-1].data_ptr(), slots.data_ptr())
        jobs.append(((listed.data_ptr(), partner.data_ptr()), shape, inverse, out, slots))
        lists += made
    given = [job[:4] for job in jobs]
    if active.device.type == "cuda":
        with torch.cuda.device(active.device):
            _C.list_jobs_cuda(given, images, torch.cuda.current_stream().cuda_stream)
    else:
        _C.list_jobs(given, images)
    return lists


def window_lists(source: Tensor, active: Tensor, window: Window) -> list[Tensor]:
    """Rows of the outputs, rows of the inputs (three tensors each) and pairs (two) of a convolution."""
    if active.device.type == "cuda" and hasattr(_C, "list_jobs_cuda") and active.numel() and source.numel():
        return compiled_lists(source, active, window)
    words, reached = tap_words(source, active, window)
    return [
        *sorted_rows(active, words, window.taps),
        *sorted_rows(source, reached, window.taps),
        *tap_pairs(words, window.taps),
    ]


class ListedSites(Sites):
    """Sites that keep the lists of their windows, so that the layers of a stage share them."""

    _kept: dict[tuple[Window, Any], list[Tensor]]

    @classmethod
    def make(cls, sites: Sites) -> "ListedSites":
        """Sites with an empty store of lists."""
        made = cls(*sites)
        made._kept = {}
        return made

    def lists(self, source: Tensor, window: Window) -> list[Tensor]:
        """Lists of a window over the input map `source`, made once."""
        key = (window, tuple(source.shape))
        if key not in self._kept:
            self._kept[key] = window_lists(source, self.active, window)
        return self._kept[key]


def nhwc(x: Tensor) -> Tensor:
    """x in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def zeros(x: Tensor, channels: int, size: Pair) -> Tensor:
    """A map [B, channels, h, w] of zeros in channels_last memory; kernels then write its active sites."""
    return x.new_zeros(x.shape[0], *size, channels).movedim(-1, 1)


@torch.library.custom_op("rcmstr_fast::masked_conv2d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, lists: list[Tensor], size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    from rcmstr_fast.kernels.masked_conv import masked_conv

    out = zeros(x, weight.shape[0], (size[0], size[1]))
    rows = (lists[0], lists[1], lists[2])
    return masked_conv(nhwc(x), weight, rows, out, (stride[0], stride[1]), (padding[0], padding[1]), False)


@_conv.register_fake
def _(x, weight, lists, size, stride, padding):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], *size, weight.shape[0]).movedim(-1, 1)


@torch.library.custom_op("rcmstr_fast::masked_conv2d_bwd", mutates_args=())
def _conv_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, lists: list[Tensor], stride: list[int], padding: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    from rcmstr_fast.kernels.masked_conv import masked_conv, masked_conv_weight

    grad, x, steps, pads = nhwc(grad), nhwc(x), (stride[0], stride[1]), (padding[0], padding[1])
    grad_x = x.new_empty(0)
    if wanted:
        grad_x = zeros(x, x.shape[1], (x.shape[2], x.shape[3]))
        masked_conv(grad, weight, (lists[3], lists[4], lists[5]), grad_x, steps, pads, True)
    kernel = (weight.shape[2], weight.shape[3])
    grad_weight = masked_conv_weight(x, grad, kernel, lists[6], lists[7], steps, pads).movedim(-1, 1)
    return grad_x, grad_weight.to(weight.dtype)


@_conv_bwd.register_fake
def _(grad, x, weight, lists, stride, padding, wanted):  # type: ignore[no-untyped-def]
    nhwc = x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return nhwc if wanted else x.new_empty(0), weight.new_empty(
        weight.shape[0], *weight.shape[2:], weight.shape[1]
    ).movedim(-1, 1)


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, lists, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, *lists)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, *lists = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_x, grad_weight = _conv_bwd(grad, x, weight, lists, ctx.stride, ctx.padding, wanted)
    return grad_x if wanted else None, grad_weight, [None] * len(lists), None, None, None


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)


@torch.library.custom_op("rcmstr_fast::masked_batch_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, residual: Tensor | None, groups: list[int], eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_norm import masked_norm_fwd

    out = zeros(x, x.shape[1], (x.shape[2], x.shape[3]))
    residual = None if residual is None else nhwc(residual)
    moments = masked_norm_fwd(nhwc(x), weight, bias, active.contiguous(), residual, out, groups, eps, relu)
    return out, *moments


@_norm.register_fake
def _(x, weight, bias, active, residual, groups, eps, relu):  # type: ignore[no-untyped-def]
    out = x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    mean, rstd = (weight.new_empty(len(groups), x.shape[1]) for _ in range(2))
    return out, mean, rstd, weight.new_empty(len(groups))


@torch.library.custom_op("rcmstr_fast::masked_batch_norm_bwd", mutates_args=())
def _norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, active: Tensor, moments: list[Tensor], groups: list[int],
    relu: bool, added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_norm import masked_norm_bwd

    x = nhwc(x)
    grad_x = zeros(x, x.shape[1], (x.shape[2], x.shape[3]))
    grad_residual = torch.zeros_like(grad_x) if added else None
    mean, rstd, counts = moments
    grad_weight, grad_bias = masked_norm_bwd(
        nhwc(grad), x, out, weight, active.contiguous(), mean, rstd, counts, grad_x, grad_residual, groups, relu
    )
    residual = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, residual, grad_weight.clone(), grad_bias.clone()


@_norm_bwd.register_fake
def _(grad, x, out, weight, active, moments, groups, relu, added):  # type: ignore[no-untyped-def]
    grad_x, grad_residual = (x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1) for _ in range(2))
    grads = torch.empty_like(weight), torch.empty_like(weight)
    return grad_x, grad_residual if added else x.new_empty(0), *grads


def _norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, active, residual, ctx.groups, _, ctx.relu = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(x, weight, active, *output)
    ctx.mark_non_differentiable(*output[1:])


def _norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, weight, active, out, *moments = ctx.saved_tensors
    grads = _norm_bwd(grad, x, out, weight, active, moments, ctx.groups, ctx.relu, ctx.added)
    return grads[0], grads[2], grads[3], None, grads[1] if ctx.added else None, None, None, None


_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def _masked_conv2d(x: Tensor, weight: Tensor, sites: Sites, *, stride: Any, padding: Any) -> Tensor:
    steps, pads = ((n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding))
    window, source = Window((weight.shape[2], weight.shape[3]), steps, pads), input_map(x, sites)
    lists = (
        sites.lists(source, window) if isinstance(sites, ListedSites) else window_lists(source, sites.active, window)
    )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _conv(x, weight, lists, list(sites.active.shape[2:]), list(steps), list(pads))


def _masked_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, *, eps: float, residual: Tensor | None, relu: bool,
    group_size: int | None,
) -> Tensor:  # fmt: skip
    if residual is not None:
        residual = residual.to(x.dtype)
    groups = group_sizes(x.shape[0], group_size or 0)
    return _norm(x, weight.float(), bias.float(), sites.active, residual, groups, eps, relu)[0]


def _conv_reasons(x: Tensor, weight: Tensor, sites: Sites, *, stride: Any, padding: Any) -> list[str]:
    found = triton_backend.operand_reasons({"x": x, "weight": weight})
    taps = weight.shape[2] * weight.shape[3]
    if taps > 9 or max(weight.shape[2:]) > 3:
        found.append(f"kernels of up to 3x3 only, got {weight.shape[2]}x{weight.shape[3]}")
    if sites.active.numel() >= 1 << 31 or x[:, 0].numel() >= 1 << 31:
        found.append("maps must have fewer than 2^31 sites")
    return found


def _norm_reasons(x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, **_: Any) -> list[str]:
    return triton_backend.operand_reasons({"x": x})


def avoid(x: Tensor, *arguments: Any, **_: Any) -> list[str]:
    """Why the automatic choice passes over the kernels: `masked_storage` gives listed sites where they are to run."""
    chosen = any(isinstance(a, ListedSites) for a in arguments)
    return triton_backend.avoid_on_cpu() or ([] if chosen else ["masked_storage did not choose it for this stage"])


def register_listed(op: Operation) -> None:
    """Register the Triton backend of `masked_conv2d` or `masked_batch_norm`."""
    conv = op.name == "masked_conv2d"
    register(
        op,
        "triton",
        _masked_conv2d if conv else _masked_batch_norm,
        unsupported_reasons=_conv_reasons if conv else _norm_reasons,
        available=triton_backend.reasons,
        avoid=avoid,
    )
