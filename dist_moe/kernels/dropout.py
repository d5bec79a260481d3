"""Dropout whose random numbers cost little on a CPU: 16 bits per element, four elements per draw."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 2**16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Drop elements like ``torch.nn.functional.dropout``, ``probability`` rounded to a multiple of 2^-16 on a CPU."""
    if not training or probability == 0 or x.is_cuda:
        return F.dropout(x, probability, training)
    dropped = round(probability * LEVELS)
    if dropped == 0:
        return x
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    levels = words.view(torch.int16)[: x.numel()].view(x.shape)
    return _keep(x, levels, dropped)


def dropout_of_stacks(x: Tensor, probability: float, training: bool) -> Tensor:
    """Drop elements like :func:`dropout`, a draw for each: also under ``torch.vmap(..., randomness="different")``."""
    if not training or probability == 0 or x.is_cuda:
        return F.dropout(x, probability, training)
    dropped = round(probability * LEVELS)
    levels = torch.randint(-LEVELS // 2, LEVELS // 2, x.shape, dtype=torch.int16)
    return _keep(x, levels, dropped)


def _keep(x: Tensor, levels: Tensor, dropped: int) -> Tensor:
    """``x`` scaled up where its random level is not among the ``dropped`` lowest, else 0."""
    return x * (levels >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
