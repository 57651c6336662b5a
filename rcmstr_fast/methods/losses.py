"""The relational contrastive loss over levels and between levels (paper Eq. 4-7, SPEC section 4)."""

import torch
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.config import MethodConfig
from rcmstr_fast.methods.permutation import kept_frames, pairing_windows
from rcmstr_fast.methods.queue import Queue

MONITORED_ROWS = 256


class RelationalLoss(nn.Module):
    """loss_rcl of one micro-batch and its parts.

    Args:
        method: levels, weights, temperatures and inter-level switches.
        frames: frames T an image.
    """

    def __init__(self, method: MethodConfig, frames: int) -> None:
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
        queues: dict[str, Queue],
        inter_queues: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms.

        Args:
            query: level -> [B * rows, D] unit rows of the query view, with gradient.
            permuted: the same of the permuted images, or None.
            key: level -> unit rows of the key view.
            queues: level -> queue.
            inter_queues: level -> [K, D] that the inter-level terms compare with.
        Returns:
            loss_rcl 0-d and the detached terms by name.
        """
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(iter(query.values())).device)
        for level in self.method.levels or ():
            extra = None if permuted is None else permuted[level]
            total = total + self._level(level, query[level], extra, key[level], queues[level].rows, terms)
        terms["loss_hier"] = total.detach()
        for name, low, high in (("f2s", "frame", "subword"), ("s2w", "subword", "word")):
            if self.method.inter in (name, "both") and low in query and high in key:
                loss = self._between(name, query[low], key[high], inter_queues[high])
                terms[f"loss_{name}"] = loss.detach()
                total = total + float(self.method.inter_weight or 0.0) * loss
        terms["loss_rcl"] = total.detach()
        return total, terms

    def _alpha(self, queue: Tensor) -> float:
        """Weight of loss_kl: 0 without it, divided by K where the preset takes the mean over the queue."""
        alpha = self.method.alpha if self.method.kl else 0.0
        return alpha / queue.shape[0] if self.method.kl_reduction == "mean" else alpha

    def _re(self, query: Tensor, key: Tensor, queue: Tensor, permuted: Tensor | None = None) -> ops.RelationalLoss:
        """loss_re (Eq. 3), or the mean over query and permuted query (Eq. 4)."""
        method = self.method
        return ops.relational_loss(
            query, key, queue, query_permuted=permuted,
            tau_info=method.tau_info, tau_kl=method.tau_kl, alpha=self._alpha(queue),
        )  # fmt: skip

    def _level(
        self, level: str, query: Tensor, permuted: Tensor | None, key: Tensor, queue: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """loss_ere of one level."""
        if permuted is not None and len(permuted) != len(query):  # drop_boundary: fewer permuted frames than frames
            whole = self._re(query, key, queue)
            part = self._re(permuted, key.unflatten(0, (-1, self.frames))[:, self.kept].flatten(0, 1), queue)
            result = ops.RelationalLoss(*(0.5 * (a + b) for a, b in zip(whole, part)))
        else:
            result = self._re(query, key, queue, permuted)
        terms[f"loss_info_{level}"] = result.info.detach()
        terms[f"loss_kl_{level}"] = result.kl.detach()
        terms[f"loss_ere_{level}"] = result.loss.detach()
        return result.loss

    def _between(self, name: str, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """loss_f2s or loss_s2w (Eq. 6): every pair (low row, high row) of every image."""
        pairs = getattr(self, f"{name}_pairs")
        low, high = (self.frames, self.method.num_subwords) if name == "f2s" else (self.method.num_subwords, 1)
        images = torch.arange(len(query) // low, device=query.device)[:, None]
        query_rows = (images * low + pairs[:, 0]).flatten()
        key_rows = (images * high + pairs[:, 1]).flatten()
        if self.method.inter_loss == "kl":
            loss = ops.relation_kl(query, key, queue, tau=self.method.tau_kl, query_rows=query_rows, key_rows=key_rows)
            return loss / queue.shape[0] if self.method.kl_reduction == "mean" else loss
        alpha = 0.0 if self.method.inter_loss == "info" else self._alpha(queue)
        return ops.relational_loss(
            query[query_rows], key[key_rows], queue,
            tau_info=self.method.tau_info, tau_kl=self.method.tau_kl, alpha=alpha,
        ).loss  # fmt: skip


@torch.no_grad()
def monitors(level: str, query: Tensor, key: Tensor, queue: Tensor) -> dict[str, Tensor]:
    """Early warning of a level: contrastive accuracy and feature spread.

    Args:
        level: name in the result.
        query: [M, D] unit rows; at most MONITORED_ROWS evenly spaced ones are compared with the queue.
        key: [M, D].
        queue: [K, D].
    Returns:
        `accuracy_<level>`: share of rows whose key is nearer than every queue row;
        `spread_<level>`: standard deviation of a feature over rows, times sqrt(D): 1 for evenly spread
        directions, 0 when all rows have collapsed to one.
    """
    some = torch.linspace(0, len(query) - 1, min(len(query), MONITORED_ROWS), device=query.device).long()
    nearest = (query[some] @ queue.T.to(query.dtype)).amax(dim=1)
    accuracy = ((query[some] * key[some]).sum(dim=1) > nearest).float().mean()
    spread = query.std(dim=0, correction=0).mean() * query.shape[1] ** 0.5
    return {f"accuracy_{level}": accuracy, f"spread_{level}": spread}
