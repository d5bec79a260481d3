"""Dispatch and combine: token rows to the ranks of their experts, and results back.

    rows sorted by expert                 on the sending rank (experts of a rank are contiguous)
      | all-to-all, split by rank
    blocks (source rank, local expert)    on the receiving rank
      | regroup
    blocks (local expert, source rank)    what a bank of experts takes

Combine walks the same way back. Forward's plan serves the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dist_moe.kernels import RowCounts, on_device_path
from dist_moe.parallel.world import World


@dataclass(frozen=True)
class DispatchPlan:
    """Numbers of rows that this rank sends to every expert, and receives for each of its own.

    ``send_rows``, ``receive_rows``: per rank, host integers. ``rows_per_local_expert``: after the regrouping;
    on an accelerator (E_local,) int64 that stays there.
    ``sent_RL``: rows that go to each rank for each of its experts. ``received_RL``: rows that come from each
    rank for each local expert.
    """

    send_rows: list[int]
    receive_rows: list[int]
    rows_per_local_expert: RowCounts
    sent_RL: list[list[int]]
    received_RL: list[list[int]]


def plan_dispatch(rows_per_expert_E: Tensor, world: World, num_rows: int | None = None) -> DispatchPlan:
    """Exchange the counts (the only metadata on the wire) and derive the plan from them. Collective.

    ``rows_per_expert_E``: (E,) int64, this rank's rows for each global expert; E is divisible by
    the world's size. ``num_rows``: their sum, if the caller knows it: on an accelerator the host then waits
    once for the counts of several ranks, and never on one.
    """
    if world.size == 1 and num_rows is not None and on_device_path(rows_per_expert_E):
        return DispatchPlan([num_rows], [num_rows], rows_per_expert_E, [[num_rows]], [[num_rows]])
    send_RL = rows_per_expert_E.view(world.size, -1)
    one_row_each = [1] * world.size
    both = torch.stack([send_RL, world.exchange(send_RL, one_row_each, one_row_each)])
    sent_RL, received_RL = both.tolist()
    return DispatchPlan(
        send_rows=list(map(sum, sent_RL)),
        receive_rows=list(map(sum, received_RL)),
        rows_per_local_expert=(
            both[1].sum(0) if on_device_path(both) else list(map(sum, zip(*received_RL, strict=True)))
        ),
        sent_RL=sent_RL,
        received_RL=received_RL,
    )


def dispatch(x_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """Send (N, D) rows, sorted by global expert, to their ranks; return this rank's (N', D), sorted by local expert."""
    return regrouped(world.all_to_all(x_ND, plan.send_rows, plan.receive_rows), plan.received_RL)


def combine(y_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """Send (N', D) results, sorted by local expert, back to their tokens; return (N, D), sorted by global expert."""
    received_LR = list(zip(*plan.received_RL, strict=True))
    return world.all_to_all(regrouped(y_ND, received_LR), plan.receive_rows, plan.send_rows)


def regrouped(x_ND: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Sort blocks of ``rows[i][j]`` rows, which are sorted by i, then by j: by j, then by i.

    Whole blocks are copied, not rows, once forward and once backward; one row or column of blocks is as it is.
    """
    columns = len(rows[0])
    if min(len(rows), columns) == 1:
        return x_ND
    blocks = x_ND.split(list(chain(*rows)))
    return torch.cat([block for j in range(columns) for block in blocks[j::columns]])
