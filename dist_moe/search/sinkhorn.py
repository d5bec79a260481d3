"""Relaxed permutations: Sinkhorn's iteration and the entropy that pulls it towards a vertex."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ENTROPY_EPSILON = 1e-6


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp of (..., n, n) logits whose rows, then columns, are normalised ``iterations`` times, in log space."""
    for _ in range(iterations):
        logits = _normalise(logits)
    return logits.exp()


def sinkhorn_each(logits: Tensor, iterations: Sequence[int]) -> Tensor:
    """Return the :func:`sinkhorn` of (B, ..., n, n) logits, with ``iterations[b]`` iterations for entry b of axis 0."""
    wanted = torch.tensor(iterations, device=logits.device).view(-1, *[1] * (logits.dim() - 1))
    for done in range(max(iterations)):
        logits = torch.where(done < wanted, _normalise(logits), logits)
    return logits.exp()


def _normalise(logits: Tensor) -> Tensor:
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logits - logits.logsumexp(dim=-2, keepdim=True)


def permutation_entropy(soft: Tensor) -> Tensor:
    """Return the mean over matrices (..., n, n) of the sum of -P log(P + 1e-6) over P and over P with its rows
    normalised (Sinkhorn ends on columns)."""
    rows = soft / soft.sum(dim=-1, keepdim=True)
    entropy = sum((-(p * (p + ENTROPY_EPSILON).log()).sum(dim=(-2, -1)) for p in (soft, rows)), soft.new_zeros(()))
    return entropy.mean()
