"""The storage of a GPU: maps stay in place, and lists say where their active sites are; made on the device.

The host never learns how many sites are active. A list of positions therefore has room for every site: the active ones
come first, and among them those that have the same taps stand together; `number` [1] says on the device how many there
are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from rcmstr_fast.ops import native
from rcmstr_fast.ops.masked.layers import Pair, Sites, StoredSites, Window
from rcmstr_fast.ops.masked.reference import input_map, keep

#: Input map, output map and window of a convolution.
Request = tuple[Tensor, Tensor, Window]
#: Windows whose lists are made together: three jobs each, of the 16 (kMaxJobs) that csrc/sites.h takes at a time.
WINDOWS_A_CALL = 5


class WindowLists(NamedTuple):
    """What the kernels of a convolution read instead of searching the maps; all int32.

    Bit v of a site's word says that tap v joins the site with an active site of the other map.

    Attributes:
        positions: [S] output sites, see above.
        bits: [S] their words.
        number: [1] active outputs.
        source_positions: [S0] input sites.
        source_bits: [S0] their words.
        source_number: [1] active inputs.
        pairs: [2, taps, S] the outputs that have each tap, in the order of the map, and the inputs under it.
        pair_counts: [taps] how many those are.
    """

    positions: Tensor
    bits: Tensor
    number: Tensor
    source_positions: Tensor
    source_bits: Tensor
    source_number: Tensor
    pairs: Tensor
    pair_counts: Tensor


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


def tap_pairs(words: Tensor, window: Window, source_size: Pair) -> list[Tensor]:
    """pairs [2, taps, S] and pair_counts [taps], int32: outputs that have each tap, in the order of the map, and the
    inputs under it, of maps of `source_size`."""
    images, height, width = words.shape
    taps, sites, device = window.taps, words.numel(), words.device
    has = (words.flatten()[None, :] >> torch.arange(taps, device=device, dtype=torch.int32)[:, None]) & 1
    rank = torch.cumsum(has, dim=1, dtype=torch.int32)
    place = torch.where(has > 0, rank - 1, sites).long()
    (_, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    tap = torch.arange(taps, device=device)[:, None, None, None]
    image, y, x = (
        torch.arange(n, device=device).view(shape)
        for n, shape in ((images, (-1, 1, 1)), (height, (-1, 1)), (width, (-1,)))
    )
    inputs = (image * source_size[0] + y * sh - ph + tap // kw) * source_size[1] + x * sw - pw + tap % kw
    pairs = rank.new_zeros(2, taps, sites + 1)
    pairs[0].scatter_(1, place, torch.arange(sites, device=device, dtype=torch.int32).expand(taps, sites))
    pairs[1].scatter_(1, place, inputs.flatten(1).to(torch.int32))
    return [pairs[..., :sites].contiguous(), has.sum(dim=1, dtype=torch.int32)]


def _jobs(source: Tensor, active: Tensor, window: Window) -> tuple[list[tuple], list[Tensor]]:
    """What csrc/sites.h is to do for a window, with the memory it uses, and the lists it will have made."""
    source, active = source.contiguous(), active.contiguous()
    images, taps = active.shape[0], window.taps
    shape = (*source.shape[2:], *active.shape[2:], *window.numbers)

    def ints(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=active.device)

    jobs, lists = [], []
    for mine, partner, inverse, pairs in (
        (active, source, False, False),
        (source, active, True, False),
        (active, source, False, True),
    ):
        sites = mine.numel()
        made = [ints(2, taps, sites), ints(taps)] if pairs else [ints(sites), ints(sites), ints(1)]
        slots = ints(((taps if pairs else 1 << taps) + 1) * max(1, images))
        out = (made[0].data_ptr(), 0 if pairs else made[1].data_ptr(), made[-1].data_ptr(), slots.data_ptr())
        jobs.append(((mine.data_ptr(), partner.data_ptr()), shape, inverse, out, (mine, partner, slots)))
        lists += made
    return jobs, lists


def compiled_lists(requests: Sequence[Request]) -> list[WindowLists]:
    """`window_lists` of each request by csrc/sites.h; what lies behind a count is not written.

    On a GPU five windows take three launches together.
    """
    made = []
    for first in range(0, len(requests), WINDOWS_A_CALL):
        parts = [_jobs(*request) for request in requests[first : first + WINDOWS_A_CALL]]
        jobs = [job[:4] for part, _ in parts for job in part]
        active = requests[first][1]
        if active.device.type == "cuda":
            with torch.cuda.device(active.device):
                native.function("list_jobs_cuda")(jobs, active.shape[0], torch.cuda.current_stream().cuda_stream)
        else:
            native.function("list_jobs")(jobs, active.shape[0])
        made += [WindowLists(*lists) for _, lists in parts]
    return made


def window_lists(source: Tensor, active: Tensor, window: Window) -> WindowLists:
    """The lists of a convolution from the input map [B, 1, h0, w0] to the output map [B, 1, h, w]."""
    if _compiled(source, active):
        return compiled_lists([(source, active, window)])[0]
    words, reached = tap_words(source, active, window)
    return WindowLists(
        *sorted_rows(active, words, window.taps),
        *sorted_rows(source, reached, window.taps),
        *tap_pairs(words, window, (source.shape[2], source.shape[3])),
    )


def _compiled(source: Tensor, active: Tensor) -> bool:
    on_gpu = active.device.type == "cuda" and not native.cuda_reasons(active.device)
    return on_gpu and active.numel() > 0 and source.numel() > 0


class ListSites(StoredSites):
    """Sites of a stage whose layers work on maps in place and read the active sites from lists.

    Where they are `kept`, what the layers give, gradients too, holds anything at inactive sites: the next layer does
    not read it, so nobody fills it.
    """

    backend = "triton"
    _kept: dict[tuple[Window, tuple[int, ...]], WindowLists]

    @classmethod
    def make(cls, sites: Sites, kept: bool = True) -> Self:
        """Store a stage, without lists yet."""
        made = super().make(sites, kept)
        made._kept = {}
        return made

    def take_in(self, x: Tensor, window: Window | None) -> Tensor:
        """x with the channels of a site side by side in memory."""
        return x.contiguous(memory_format=torch.channels_last)

    def give_out(self, x: Tensor) -> Tensor:
        """x with zeros at inactive sites; a layer of a storage that is not kept has written them already."""
        return keep(x, self.active) if self.kept else x

    def as_map(self, x: Tensor, window: Window | None) -> Tensor:
        """x: it is a map."""
        return x

    def of_window(self, x: Tensor, window: Window) -> WindowLists:
        """Lists of a window over x."""
        source = input_map(x, self)
        key = (window, tuple(source.shape))
        if key not in self._kept:
            self._kept[key] = window_lists(source, self.active, window)
        return self._kept[key]

    def requests(self, windows: Sequence[Window]) -> list[Request]:
        """What the lists of the windows of this stage's convolutions are made of."""
        size, before = (self.active.shape[2], self.active.shape[3]), self.source
        other = self.active if before is None else before
        return [
            (self.active if window.output_size(size) == size else other, self.active, window)
            for window in dict.fromkeys(windows)
        ]

    def put(self, requests: Sequence[Request], lists: Sequence[WindowLists]) -> None:
        """Keep lists that have been made."""
        self._kept |= {(window, tuple(source.shape)): made for (source, _, window), made in zip(requests, lists)}


def prepare(stages: Sequence[Sites], windows: Sequence[Sequence[Window]]) -> None:
    """Make the lists of all windows of a pass together where a GPU makes them; elsewhere each is made when needed."""
    listed = [
        (stage, stage.requests(w)) for stage, w in zip(stages, windows, strict=True) if isinstance(stage, ListSites)
    ]
    together = [request for _, requests in listed for request in requests]
    if not all(_compiled(source, active) for source, active, _ in together):
        return
    lists = iter(compiled_lists(together))
    for stage, requests in listed:
        stage.put(requests, [next(lists) for _ in requests])
