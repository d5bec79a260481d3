"""Dropout whose random numbers cost little on a CPU: 16 bits per element, four elements per draw."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 2**16


def dropout(x: Tensor, probability: float, training: bool, *, under_vmap: bool = False) -> Tensor:
    """Drop elements like ``torch.nn.functional.dropout``, ``probability`` rounded to a multiple of 2^-16 on a CPU.

    ``under_vmap``: a draw for each element, which also works under ``torch.vmap(..., randomness="different")``.
    """
    if not training or probability == 0 or x.is_cuda:
        return F.dropout(x, probability, training)
    dropped = round(probability * LEVELS)
    if dropped == 0:
        return x
    if under_vmap:
        levels = torch.randint(-LEVELS // 2, LEVELS // 2, x.shape, dtype=torch.int16)
    else:
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (levels >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
