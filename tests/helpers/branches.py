"""Naive slot maps of gates whose branches have slots of their own: slot j * n + i is slot i of branch j."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.routing import HardMap, check_tables


def hard_map(table_KS: Tensor, num_experts: int) -> HardMap:
    return HardMap(table_KS, num_experts, check_tables(table_KS.unsqueeze(0), num_experts)[0])


def naive_branch_relabel(mixture_TS: Tensor, table_KS: Tensor, num_experts: int | None = None) -> Tensor:
    """(T, K S) -> (T, E): slot i of branch j goes to expert ``table_KS[j, i]``; shares of an expert add up.

    There are as many experts as slots if ``num_experts`` is not given.
    """
    branches, num_slots = table_KS.shape
    relabelled_TE = mixture_TS.new_zeros(len(mixture_TS), num_experts or num_slots)
    for t in range(len(mixture_TS)):
        for j in range(branches):
            for i in range(num_slots):
                relabelled_TE[t, int(table_KS[j, i])] += mixture_TS[t, j * num_slots + i]
    return relabelled_TE


def naive_branch_sum(mixture_TS: Tensor, matrix_KEE: Tensor) -> Tensor:
    """(T, K n) -> (T, n): g'_e = sum over branches j and slots s of g_js P_j[s, e], not scaled."""
    branches, num_experts, _ = matrix_KEE.shape
    rows = [mixture_TS.new_zeros(num_experts) for _ in mixture_TS]
    for t in range(len(mixture_TS)):
        for j in range(branches):
            for s in range(num_experts):
                rows[t] = rows[t] + mixture_TS[t, j * num_experts + s] * matrix_KEE[j, s]
    return torch.stack(rows) if rows else mixture_TS.new_zeros(0, num_experts)


def naive_branch_mix(mixture_TS: Tensor, matrix_KEE: Tensor) -> Tensor:
    """The same, each token scaled to the total that it had."""
    mixed_TE = naive_branch_sum(mixture_TS, matrix_KEE)
    scaled_TE = mixed_TE.clone()
    for t in range(len(mixture_TS)):
        if mixed_TE[t].detach().sum() > 0:
            scaled_TE[t] = mixed_TE[t] * mixture_TS[t].sum() / mixed_TE[t].sum()
    return scaled_TE
