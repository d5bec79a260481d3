"""Dispatch and combine: token rows to the ranks of their experts, and results back.

    rows sorted by expert                 on the sending rank (experts of a rank are contiguous)
      | all-to-all, split by rank
    blocks (source rank, local expert)    on the receiving rank
      | regroup
    blocks (local expert, source rank)    what a bank of experts takes

Combine walks the same way back. Forward's plan serves the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.kernels import RowCounts, on_device_path
from dist_moe.parallel.world import World


@dataclass(frozen=True)
class DispatchPlan:
    """Who sends how many rows to whom.

    ``send_rows``, ``receive_rows``: per rank, host integers. ``rows_per_local_expert``: after the regrouping;
    on an accelerator (E_local,) int64 that stays there.
    ``regroup_N``: for each regrouped row its place among the received ones; None if they agree.
    """

    send_rows: list[int]
    receive_rows: list[int]
    rows_per_local_expert: RowCounts
    regroup_N: Tensor | None


def plan_dispatch(rows_per_expert_E: Tensor, world: World, num_rows: int | None = None) -> DispatchPlan:
    """Exchange the counts (the only metadata on the wire) and derive the plan from them.

    ``rows_per_expert_E``: (E,) int64, this rank's rows for each global expert; E is divisible by
    the world's size. ``num_rows``: their sum, if the caller knows it: on an accelerator the host then waits
    once for the counts of several ranks, and never on one.
    """
    if world.size == 1 and num_rows is not None and on_device_path(rows_per_expert_E):
        return DispatchPlan([num_rows], [num_rows], rows_per_expert_E, None)
    send_RL = rows_per_expert_E.view(world.size, -1)
    receive_RL = world.exchange_counts(send_RL)
    send_rows, receive_rows, rows_per_local_expert = (
        torch.cat([send_RL.sum(1), receive_RL.sum(1), receive_RL.sum(0)])
        .cpu()
        .split([world.size, world.size, receive_RL.shape[1]])
    )
    return DispatchPlan(
        send_rows.tolist(),
        receive_rows.tolist(),
        receive_RL.sum(0) if on_device_path(receive_RL) else rows_per_local_expert.tolist(),
        _regrouping(receive_RL, int(receive_rows.sum())) if world.size > 1 else None,
    )


def dispatch(x_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """(N, D) rows sorted by global expert -> this rank's rows (N', D), sorted by local expert."""
    received = world.all_to_all(x_ND, plan.send_rows, plan.receive_rows)
    return received if plan.regroup_N is None else received[plan.regroup_N]


def combine(y_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """The way back: (N', D) rows sorted by local expert -> (N, D), sorted by global expert."""
    if plan.regroup_N is not None:
        y_ND = torch.empty_like(y_ND).index_copy(0, plan.regroup_N, y_ND)
    return world.all_to_all(y_ND, plan.receive_rows, plan.send_rows)


def _regrouping(receive_RL: Tensor, num_rows: int) -> Tensor:
    """Order that turns blocks (source rank, local expert) into blocks (local expert, source rank)."""
    num_ranks, num_local = receive_RL.shape
    local_expert = torch.arange(num_local, device=receive_RL.device).repeat(num_ranks)
    return torch.repeat_interleave(local_expert, receive_RL.flatten(), output_size=num_rows).argsort(stable=True)
