"""The exchange alone, against nothing but ``all_to_all_single`` of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.parallel import ProcessWorld, combine, dispatch, plan_dispatch
from tools.bench.jobs import Job
from tools.bench.layer import Place, in_turns
from tools.bench.workloads import Workload, material

RAW = "all_to_all_single"
TRAVEL = "counts and rows"
WHOLE = "counts, rows and regrouping"
FEWEST, MOST = 20, 200


def study(job: Job, place: Place) -> dict[str, Any]:
    """Seconds of forward and backward: rows there and back, their gradients there and back. Collective."""
    workload, world = job.workload, place.world
    assert isinstance(world, ProcessWorld), "an exchange needs several ranks"
    ways = ways_of(workload, world, job.seed)
    place.say("timing")
    first = in_turns(ways, 2)
    repetitions = int(max(FEWEST, min(MOST, job.seconds / sum(min(taken) for taken in first.values()))))
    world.traffic.reset()
    ways[WHOLE]()
    sent = world.traffic.bytes
    return {"workload": asdict(workload), "bytes_sent": sent, "seconds": in_turns(ways, repetitions, say=place.say)}


def ways_of(workload: Workload, world: ProcessWorld, seed: int) -> dict[str, Callable[[], Tensor]]:
    """By name; each gives the gradient of the rows, which went the whole way: they must be equal. Collective."""
    given = material(workload, world.rank, seed)
    expert_N, order_N = given.expert_TK.flatten().sort(stable=True)
    rows_ND = given.x_TD[order_N // workload.k]
    rows_per_expert_E = torch.bincount(expert_N, minlength=workload.experts)
    plan = plan_dispatch(rows_per_expert_E, world)
    there_ND = rows_ND.new_empty(sum(plan.receive_rows), workload.width)
    back_ND = torch.empty_like(rows_ND)

    def raw() -> Tensor:
        for _ in range(2):
            dist.all_to_all_single(there_ND, rows_ND, plan.receive_rows, plan.send_rows, group=world.group)
            dist.all_to_all_single(back_ND, there_ND, plan.send_rows, plan.receive_rows, group=world.group)
        return back_ND

    def travel() -> Tensor:
        plan_dispatch(rows_per_expert_E, world)
        leaf_ND = rows_ND.detach().requires_grad_()
        received_ND = world.all_to_all(leaf_ND, plan.send_rows, plan.receive_rows)
        return _gradient(leaf_ND, world.all_to_all(received_ND, plan.receive_rows, plan.send_rows), rows_ND)

    def whole() -> Tensor:
        own_plan = plan_dispatch(rows_per_expert_E, world)
        leaf_ND = rows_ND.detach().requires_grad_()
        return _gradient(leaf_ND, combine(dispatch(leaf_ND, own_plan, world), own_plan, world), rows_ND)

    ways = {RAW: raw, TRAVEL: travel, WHOLE: whole}
    for name, way in ways.items():
        if not torch.equal(way(), rows_ND):
            raise ValueError(f"{name}: not every row came back to its place")
    return ways


def _gradient(leaf_ND: Tensor, output_ND: Tensor, cotangent_ND: Tensor) -> Tensor:
    output_ND.backward(cotangent_ND)
    assert leaf_ND.grad is not None
    return leaf_ND.grad
