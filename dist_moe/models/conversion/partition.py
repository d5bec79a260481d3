"""MoEBERT's way to share out the neurons of a feed-forward network: the most important ones go to every expert.

Zuo et al.: MoEBERT (NAACL 2022), section 3. With the neurons in order of falling importance, expert e of N gets the
first s, and of those after them s + e, s + e + N, s + e + 2N, ... until it has as many as it is wide.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dist_moe.errors import UserError

Order = Literal["importance", "random", "inverse"]


def ranked(importance_H: Tensor, order: Order = "importance", seed: int = 0) -> Tensor:
    """(H,) int64 neurons, the first to be kept first; of equally important ones the lower.

    "random": a permutation drawn from ``seed``; "inverse": the least important first. Both are there to compare.
    """
    if order == "random":
        return torch.randperm(len(importance_H), generator=torch.Generator().manual_seed(seed))
    return importance_H.argsort(descending=order == "importance", stable=True)


def partition(ranked_H: Tensor, num_experts: int, width: int, shared: int) -> Tensor:
    """(E, width) int64: the neurons of each expert, of which the first ``shared`` are those of all.

    Raises UserError if the neurons do not suffice, naming how many must be shared.
    """
    hidden = len(ranked_H)
    if not 0 <= shared <= width:
        raise UserError(f"shared={shared} neurons do not fit experts of {width}; allowed: 0..{width}")
    needed = shared + num_experts * (width - shared)
    if needed > hidden:
        least = -(-(num_experts * width - hidden) // max(num_experts - 1, 1))
        remedy = f"share at least {least}" if least <= width <= hidden else f"experts can be at most {hidden} wide"
        raise UserError(
            f"{num_experts} experts of {width} neurons, {shared} of them shared, take {needed} of {hidden}; {remedy}"
        )
    own_EW = torch.arange(shared, needed).view(-1, num_experts).T
    place_EW = torch.cat([torch.arange(shared).expand(num_experts, -1), own_EW], dim=1)
    return ranked_H[place_EW]
