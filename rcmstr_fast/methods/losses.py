"""The relational contrastive loss over levels and between levels (paper Eq. 4-7)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.methods.levels import RelationalSettings
from rcmstr_fast.methods.parts.monitors import some_rows, spread
from rcmstr_fast.methods.parts.queue import WholeQueue
from rcmstr_fast.methods.permutation import kept_frames, pairing_windows


class ContrastiveLoss(nn.Module):
    """loss_rcl of one micro-batch and its parts.

    Args:
        method: levels, weights, temperatures and inter-level switches.
        frames: frames T an image.
    """

    def __init__(self, method: RelationalSettings, frames: int) -> None:
        super().__init__()
        self.method = method
        self.frames = frames
        pairs = []
        for s, (start, end) in enumerate(pairing_windows(frames, method.num_subwords, method.inter_pairing)):
            pairs += [(t, s) for t in range(start, end)]
        self.register_buffer("f2s_pairs", torch.tensor(pairs), persistent=False)
        s2w = torch.tensor([(s, 0) for s in range(method.num_subwords)])
        self.register_buffer("s2w_pairs", s2w, persistent=False)
        kept = kept_frames(frames, method.num_patches) if method.division == "drop_boundary" else []
        self.register_buffer("kept", torch.tensor(kept, dtype=torch.int64), persistent=False)

    def forward(
        self,
        query: dict[str, Tensor],
        permuted: dict[str, Tensor] | None,
        key: dict[str, Tensor],
        queues: dict[str, WholeQueue],
        inter_rows: Callable[[str], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms.

        Args:
            query: level -> [B * rows, D] unit rows of the query view, with gradient.
            permuted: the same of the permuted images, or None.
            key: level -> unit rows of the key view.
            queues: level -> queue.
            inter_rows: level -> [K, D] that the inter-level terms compare with.
        Returns:
            loss_rcl 0-d and the detached terms by name.
        """
        terms: dict[str, Tensor] = {}
        wanted: list[ops.LossTerm] = []
        counts: dict[str, int] = {}
        for level in self.method.levels or ():
            extra = None if permuted is None else permuted[level]
            of_level = self._level(query[level], extra, key[level], queues[level].rows)
            wanted, counts[level] = wanted + of_level, len(of_level)
        between = []
        for name, low, high in (("f2s", "frame", "subword"), ("s2w", "subword", "word")):
            if self.method.inter in (name, "both") and low in query and high in key:
                between.append(name)
                wanted.append(self._between(name, query[low], key[high], inter_rows(high)))
        tau_info, tau_kl = self.method.tau_info, self.method.tau_kl
        results = iter(ops.relational_losses(wanted, tau_info=tau_info, tau_kl=tau_kl) if wanted else ())
        total = torch.zeros((), device=next(iter(query.values())).device)
        for name, count in counts.items():
            parts = [next(results) for _ in range(count)]
            result = parts[0] if count == 1 else ops.RelationalLoss(*(0.5 * (a + b) for a, b in zip(*parts)))
            for part in ("info", "kl"):
                terms[f"loss_{part}_{name}"] = getattr(result, part).detach()
            terms[f"loss_ere_{name}"] = result.loss.detach()
            total = total + result.loss
        terms["loss_hier"] = total.detach()
        for name, term in zip(between, wanted[len(wanted) - len(between) :]):
            loss = self._mean_over(next(results).loss, term.queue)
            terms[f"loss_{name}"] = loss.detach()
            total = total + float(self.method.inter_weight or 0.0) * loss
        terms["loss_rcl"] = total.detach()
        return total, terms

    def _alpha(self, queue: Tensor) -> float:
        """Weight of loss_kl: 0 without it, divided by K where the preset takes the mean over the queue."""
        alpha = self.method.alpha if self.method.kl else 0.0
        return alpha / queue.shape[0] if self.method.kl_reduction == "mean" else alpha

    def _mean_over(self, loss: Tensor, queue: Tensor) -> Tensor:
        """A KL between levels as the preset takes it: summed over the queue, or divided by K."""
        mean = self.method.inter_loss == "kl" and self.method.kl_reduction == "mean"
        return loss / queue.shape[0] if mean else loss

    def _level(self, query: Tensor, permuted: Tensor | None, key: Tensor, queue: Tensor) -> list[ops.LossTerm]:
        """The terms whose mean is loss_ere of one level.

        There is one, or with division=drop_boundary, where there are fewer permuted frames than frames, two.
        """
        alpha = self._alpha(queue)
        if permuted is None or len(permuted) == len(query):
            return [ops.LossTerm(query, key, queue, permuted, alpha)]
        kept = key.unflatten(0, (-1, self.frames))[:, self.kept].flatten(0, 1)
        return [ops.LossTerm(query, key, queue, None, alpha), ops.LossTerm(permuted, kept, queue, None, alpha)]

    def _between(self, name: str, query: Tensor, key: Tensor, queue: Tensor) -> ops.LossTerm:
        """loss_f2s or loss_s2w (Eq. 6): every pair (low row, high row) of every image."""
        pairs = getattr(self, f"{name}_pairs")
        low, high = (self.frames, self.method.num_subwords) if name == "f2s" else (self.method.num_subwords, 1)
        images = torch.arange(len(query) // low, device=query.device)[:, None]
        query_rows = (images * low + pairs[:, 0]).flatten()
        key_rows = (images * high + pairs[:, 1]).flatten()
        if self.method.inter_loss == "kl":
            return ops.LossTerm(query, key, queue, kl_only=True, query_rows=query_rows, key_rows=key_rows)
        alpha = 0.0 if self.method.inter_loss == "info" else self._alpha(queue)
        return ops.LossTerm(query[query_rows], key[key_rows], queue, None, alpha)


@torch.no_grad()
def monitors(level: str, query: Tensor, key: Tensor, queue: Tensor) -> dict[str, Tensor]:
    """Early warning of a level: contrastive accuracy, alignment and feature spread.

    Args:
        level: name in the result.
        query: [M, D] unit rows; at most MONITORED_ROWS evenly spaced ones are compared with the queue.
        key: [M, D].
        queue: [K, D].
    Returns:
        `accuracy_<level>`: share of rows whose key is nearer than every queue row;
        `alignment_<level>`: mean cosine of a row and its own key (Wang and Isola 2020), which does not depend on
        how full the queue is; 1 where the two views of an image give the same features;
        `spread_<level>`: standard deviation of a feature over rows, times sqrt(D): 1 for evenly spread
        directions, 0 when all rows have collapsed to one.
    """
    some = some_rows(query)
    nearest = (query[some] @ queue.T.to(query.dtype)).amax(dim=1)
    own = (query[some] * key[some]).sum(dim=1)
    return {
        f"accuracy_{level}": (own > nearest).float().mean(),
        f"alignment_{level}": own.float().mean(),
        f"spread_{level}": spread(query),
    }
