"""Entries of the queue losses: providers, inputs, and what each must return.

A provider is called with `gradient` and returns [loss] or [loss, gradient of each query]; the check compares
with float64. Peers have only a part: cut-cross-entropy and Liger the cross-entropy of a query against the queue
(entry `queue_cross_entropy`, target a queue row), Liger's JSD two calls for the symmetric KL.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.ops.entry import Entry, Provider
from rcmstr_fast import ops
from rcmstr_fast.ops import reference

TAU_INFO, TAU_KL, ALPHA = 0.07, 0.04, 0.3
CHUNK = 1024
#: Ours beside a cross-entropy: it has the positive and the KL too, so that its result is another one.
OURS_UNCHECKED = "ours (with the positive and the KL, unchecked)"


def unit(rows: int, width: int, seed: int, device: str) -> Tensor:
    """Random unit rows, fp16 on a GPU and float32 (holding the same values) on a CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, device=device)
    half = torch.nn.functional.normalize(drawn, dim=1).half()
    return half if device == "cuda" else half.float()


def _results(loss: Callable[..., Tensor], queries: list[Tensor], gradient: bool) -> list[Tensor]:
    leaves = [q.detach().requires_grad_(gradient) for q in queries]
    value = loss(*leaves)
    if not gradient:
        return [value]
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile as fast as it gets, every shape on its own; on a CPU without tuning. Compiled at the first call."""

    @functools.cache
    def made() -> Callable:
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        return torch.compile(function, mode=mode, dynamic=False)

    return lambda *arguments, **named: made()(*arguments, **named)


def _by_chunks(loss: Callable[..., Tensor], queries: list[Tensor], keys: Tensor, gradient: bool) -> list[Tensor]:
    """A loop of CHUNK rows over any loss of rows: the memory-bounded baseline everybody writes first."""
    totals, count = None, keys.shape[0]
    for start in range(0, count, CHUNK):
        here = slice(start, start + CHUNK)
        share = min(CHUNK, count - start) / count
        part = _results(
            lambda *q, here=here, share=share: share * loss(keys[here], *q), [q[here] for q in queries], gradient
        )
        totals = [[p] for p in part] if totals is None else [[*t, p] for t, p in zip(totals, part)]
    assert totals is not None
    return [torch.stack(totals[0]).sum(), *(torch.cat(t) for t in totals[1:])]


def relational_loss(shape: str, rows: int, keys: int, width: int, device: str) -> Entry:
    """loss_ere of one level with both queries."""
    query, permuted, key, queue = (unit(n, width, i, device) for i, n in enumerate((rows, rows, rows, keys)))
    queries = [query, permuted]

    def call(function: Callable[..., reference.RelationalLoss], key: Tensor, q: Tensor, e: Tensor) -> Tensor:
        return function(q, key, queue, query_permuted=e, tau_info=TAU_INFO, tau_kl=TAU_KL, alpha=ALPHA).loss

    fast = compiled(reference.relational_loss, device)

    def whole(function: Callable[..., reference.RelationalLoss]) -> Provider:
        return lambda gradient: _results(functools.partial(call, function, key), queries, gradient)

    def loop(function: Callable[..., reference.RelationalLoss]) -> Provider:
        return lambda gradient: _by_chunks(functools.partial(call, function), queries, key, gradient)

    def expected() -> list[Tensor]:
        p, n = key.double(), queue.double()

        def exact(q: Tensor, e: Tensor) -> Tensor:
            taus = {"tau_info": TAU_INFO, "tau_kl": TAU_KL, "alpha": ALPHA}
            return ops.relational_loss(q, p, n, query_permuted=e, backend="chunked", **taus).loss

        return _results(exact, [x.double() for x in queries], True)

    providers = {
        "eager": whole(reference.relational_loss),
        "compile": whole(fast),
        "chunk_loop": loop(reference.relational_loss),
        "chunk_loop_compile": loop(fast),
        "ours": whole(ops.relational_loss),
    }
    name = f"{shape}: M={rows} K={keys} D={width}"
    return Entry("relational_loss", name, expected, providers, 2.0 * rows * keys * width * 8)


def _liger_jsd(query: Tensor, key: Tensor, queue: Tensor, gradient: bool) -> list[Tensor]:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as Jsd

    def loss(q: Tensor) -> Tensor:
        ways = (Jsd.apply(q, queue, key, queue, None, beta, -100, TAU_KL) for beta in (0.0, 1.0))
        return sum(ways) / 2  # type: ignore[return-value]

    return _results(loss, [query], gradient)


def relation_kl(shape: str, pairs: int, keys: int, width: int, device: str) -> Entry:
    """loss_f2s or loss_s2w: one query, pairs already gathered."""
    query, key, queue = (unit(n, width, i, device) for i, n in enumerate((pairs, pairs, keys)))
    fast = compiled(reference.relation_kl, device)

    def whole(function: Callable[..., Tensor]) -> Provider:
        return lambda gradient: _results(lambda q: function(q, key, queue, tau=TAU_KL), [query], gradient)

    def loop(function: Callable[..., Tensor]) -> Provider:
        return lambda g: _by_chunks(lambda k, q: function(q, k, queue, tau=TAU_KL), [query], key, g)

    def expected() -> list[Tensor]:
        p, n = key.double(), queue.double()
        return _results(lambda q: ops.relation_kl(q, p, n, tau=TAU_KL, backend="chunked"), [query.double()], True)

    providers = {
        "eager": whole(reference.relation_kl),
        "compile": whole(fast),
        "chunk_loop": loop(reference.relation_kl),
        "chunk_loop_compile": loop(fast),
        "ours": whole(ops.relation_kl),
    }
    if device == "cuda" and find_spec("liger_kernel"):
        providers["liger_jsd_twice"] = functools.partial(_liger_jsd, query, key, queue)
    name = f"{shape}: M={pairs} K={keys} D={width}"
    return Entry("relation_kl", name, expected, providers, 2.0 * pairs * keys * width * 5)


def _cut_cross_entropy(query: Tensor, queue: Tensor, target: Tensor, filter_eps: str | None = "high") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(query / TAU_INFO, queue, target, filter_eps=filter_eps)


def _liger(query: Tensor, queue: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Flce

    return Flce.apply(query / TAU_INFO, queue, target)[0]


def _inf_cl(query: Tensor, queue: Tensor, target: Tensor) -> Tensor:
    from inf_cl.flash import FlashProb

    lse = FlashProb.apply((query.float() / TAU_INFO).unsqueeze(1), queue.float().unsqueeze(1))
    return (lse - (query * queue[target]).sum(1).float() / TAU_INFO).mean()


#: label -> package and loss; imported at the first call, so that a package that cannot be imported here is a row
CROSS_ENTROPIES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "cut_cross_entropy": ("cut_cross_entropy", _cut_cross_entropy),
    "cut_cross_entropy exact": ("cut_cross_entropy", functools.partial(_cut_cross_entropy, filter_eps=None)),
    "liger": ("liger_kernel", _liger),
    "inf_cl": ("inf_cl", _inf_cl),
}


def queue_cross_entropy(shape: str, rows: int, keys: int, width: int, device: str) -> Entry:
    """Cross-entropy of a query against the queue with a queue row as target: the part that peers have."""
    query, queue = unit(rows, width, 0, device), unit(keys, width, 1, device)
    target = torch.randint(0, keys, (rows,), generator=torch.Generator(device).manual_seed(2), device=device)

    def eager(q: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((q @ queue.T).float() / TAU_INFO, target)

    def ours(q: Tensor) -> Tensor:  # the positive beside the queue counts once more: the same work, another value
        return ops.relational_loss(q, queue[target], queue, tau_info=TAU_INFO, tau_kl=TAU_INFO, alpha=0.0).loss

    def expected() -> list[Tensor]:
        q = query.double().requires_grad_()
        losses = []
        for start in range(0, rows, CHUNK):
            here = slice(start, start + CHUNK)
            logits = q[here] @ queue.double().T / TAU_INFO
            losses.append(torch.nn.functional.cross_entropy(logits, target[here], reduction="sum") / rows)
            losses[-1].backward()
        return [torch.stack(losses).sum().detach(), q.grad]  # type: ignore[list-item]

    fast = compiled(eager, device)
    providers: dict[str, Provider] = {
        "eager": lambda g: _results(eager, [query], g),
        "compile": lambda g: _results(fast, [query], g),
        OURS_UNCHECKED: lambda g: _results(ours, [query], g),
    }
    if device == "cuda":
        for label, (package, loss) in CROSS_ENTROPIES.items():
            if find_spec(package):
                providers[label] = lambda g, loss=loss: _results(  # type: ignore[misc]
                    lambda q: loss(q, queue, target), [query], g
                )
    name = f"{shape}: M={rows} K={keys} D={width}"
    return Entry("queue_cross_entropy", name, expected, providers, 2.0 * rows * keys * width * 3)


def _five_by_chunks(
    ops_of: Sequence[Callable],
    levels: list[list[Tensor]],
    queues: list[Tensor],
    pairs: list[tuple[Tensor, Tensor]],
    gradient: bool,
) -> list[Tensor]:
    """The five terms of `five_terms` by `_by_chunks`, one after the other."""
    loss, kl = ops_of
    values, gradients = [], []
    for (query, permuted, key), queue in zip(levels, queues):

        def of_level(k: Tensor, q: Tensor, e: Tensor, queue: Tensor = queue) -> Tensor:
            return loss(q, k, queue, query_permuted=e, tau_info=TAU_INFO, tau_kl=TAU_KL, alpha=ALPHA).loss

        value, *found = _by_chunks(of_level, [query, permuted], key, gradient)
        values.append(value)
        gradients += found
    for i, (low, high) in enumerate(pairs):

        def between(k: Tensor, q: Tensor, queue: Tensor = queues[i + 1]) -> Tensor:
            return kl(q, k, queue, tau=TAU_KL)

        value, *found = _by_chunks(between, [levels[i][0][low]], levels[i + 1][2][high], gradient)
        values.append(value)
        if found:
            gradients[2 * i] = gradients[2 * i].index_add(0, low, found[0])
    return [torch.stack(values).sum(), *gradients]


def five_terms(shape: str, batch: int, keys: int, width: int, device: str, frames: int = 26) -> Entry:
    """All five terms of one step: three levels with both queries, frame -> subword and subword -> word."""
    sizes = (batch * frames, batch * 4, batch)
    levels = [[unit(n, width, 10 * i + j, device) for j in range(3)] for i, n in enumerate(sizes)]
    queues = [unit(keys, width, 100 + i, device) for i in range(3)]
    images = torch.arange(batch, device=device)[:, None]
    windows = torch.tensor([(t, s) for s in range(4) for t in range(6 * s, 6 * s + 8)], device=device)
    pairs = [
        ((images * frames + windows[:, 0]).flatten(), (images * 4 + windows[:, 1]).flatten()),
        (torch.arange(4 * batch, device=device), images.expand(-1, 4).flatten()),
    ]
    leaves = [q for level in levels for q in level[:2]]

    def total(ops_of: tuple[Callable, ...], *queries: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        loss, kl = ops_of
        cast = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
        value = torch.zeros((), device=device)
        for i, (level, queue) in enumerate(zip(levels, queues)):
            q, e = queries[2 * i : 2 * i + 2]
            value = (
                value
                + loss(
                    q, cast(level[2]), cast(queue), query_permuted=e, tau_info=TAU_INFO, tau_kl=TAU_KL, alpha=ALPHA
                ).loss
            )
        for i, (low, high) in enumerate(pairs):
            keys_above, queue = cast(levels[i + 1][2]), cast(queues[i + 1])
            value = value + kl(queries[2 * i], keys_above, queue, tau=TAU_KL, query_rows=low, key_rows=high)
        return value

    plain = (reference.relational_loss, reference.relation_kl)
    bounded = tuple(functools.partial(f, backend="chunked") for f in (ops.relational_loss, ops.relation_kl))
    fast = compiled(functools.partial(total, plain), device)
    fast_terms = tuple(compiled(function, device) for function in plain)

    def at_once(launch: str, *queries: Tensor) -> Tensor:
        terms = [
            ops.LossTerm(queries[2 * i], level[2], queue, queries[2 * i + 1], ALPHA)
            for i, (level, queue) in enumerate(zip(levels, queues))
        ]
        terms += [
            ops.LossTerm(queries[2 * i], levels[i + 1][2], queues[i + 1], None, ALPHA, True, low, high)
            for i, (low, high) in enumerate(pairs)
        ]
        results = ops.relational_losses(terms, tau_info=TAU_INFO, tau_kl=TAU_KL, launch=launch)
        return torch.stack([r.loss for r in results]).sum()

    def expected() -> list[Tensor]:
        exact = [q.double() for q in leaves]
        return _results(functools.partial(total, bounded, dtype=torch.float64), exact, True)

    providers: dict[str, Provider] = {
        "eager": lambda g: _results(functools.partial(total, plain), leaves, g),
        "compile": lambda g: _results(fast, leaves, g),
        "chunk_loop": functools.partial(_five_by_chunks, plain, levels, queues, pairs),
        "chunk_loop_compile": functools.partial(_five_by_chunks, fast_terms, levels, queues, pairs),
        "chunked": lambda g: _results(functools.partial(total, bounded), leaves, g),
        "ours": lambda g: _results(functools.partial(at_once, "auto"), leaves, g),
    }
    if device == "cuda":
        for launch in ("separate", "scheduled"):
            providers[f"ours, {launch}"] = lambda g, way=launch: _results(  # type: ignore[misc]
                functools.partial(at_once, way), leaves, g
            )
    work = sum(sizes) * 8 + sum(len(low) for low, _ in pairs) * 5
    return Entry("five_terms", f"{shape}: B={batch} K={keys} D={width}", expected, providers, 2.0 * work * keys * width)
