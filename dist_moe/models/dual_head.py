"""DHKD's auxiliary head, which learns the teacher's logits from the feature that the main head has for the labels.

Yang et al.: Dual-Head Knowledge Distillation (KDD 2025); its losses are in
:mod:`dist_moe.recipes.distillation.dhkd`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dist_moe.layer import BatchNormOverRanks

AuxiliaryHead = Literal["linear", "mlp"]
HIDDEN_UNITS = 200
DROPOUT = 0.1


def auxiliary_head(kind: AuxiliaryHead | None, dim: int, num_classes: int) -> nn.Module | None:
    """Return a head (B, dim) -> (B, ``num_classes``): linear, or (mlp) linear to 200, dropout 0.1, batch normalisation
    over all ranks, ReLU, linear; None for None.

    It is drawn by random numbers that are put back: the rest of a model is that of the plain student, to the bit.
    """
    if kind is None:
        return None
    with torch.random.fork_rng(devices=[]):
        if kind == "linear":
            return nn.Linear(dim, num_classes)
        return nn.Sequential(
            nn.Linear(dim, HIDDEN_UNITS),
            nn.Dropout(DROPOUT),
            BatchNormOverRanks(HIDDEN_UNITS),
            nn.ReLU(),
            nn.Linear(HIDDEN_UNITS, num_classes),
        )


def auxiliary_logits(head: nn.Module | None, x_BD: Tensor) -> Tensor | None:
    """Return (B, C) logits while ``head`` trains, else None; the random numbers of its dropout are put back."""
    if head is None or not head.training:
        return None
    with torch.random.fork_rng(devices=[x_BD.device] if x_BD.is_cuda else []):
        logit_BC: Tensor = head(x_BD)
        return logit_BC
