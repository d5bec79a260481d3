"""Peak memory of forward and backward, against what the mathematics needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.bench.candidate import Layer, step
from tools.bench.jobs import Job
from tools.bench.layer import CANDIDATES, Effort, Place, reasons
from tools.bench.workloads import Material, Workload, material


@dataclass(frozen=True)
class Memory:
    """``peak``: most bytes that were allocated at once above what there was before. ``largest``: of one tensor."""

    peak: int
    largest: int


def measure(call: Callable[[], object]) -> Memory:
    """Bytes that ``call`` allocates, as torch's allocator tells them, temporaries inside of operations included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return Memory(peak, max(sizes, default=0))


def of_layer(layer: Layer, given: Material) -> Memory:
    """Return the memory of a step, after one that makes what is kept. The gradients are forgotten afterwards."""
    step(layer, given.x_TD, given.cotangent_TD)
    layer.zero_grad(set_to_none=True)
    found = measure(lambda: step(layer, given.x_TD, given.cotangent_TD))
    layer.zero_grad(set_to_none=True)
    return found


def needed(workload: Workload) -> dict[str, int]:
    """Bytes: tokens, outputs and the gradients of both; gradients of the weights; rows that the backward pass uses.

    Of each row: itself, the two that went into the activation, and the result, for the gradient of its weight.
    """
    w, size = workload, workload.torch_dtype.itemsize
    rows = w.tokens * w.k
    return {
        "inputs and outputs": 4 * w.tokens * w.width * size,
        "gradients of weights": w.weight_bytes + w.experts * w.width * size,
        "saved rows": rows * (2 * w.width + 2 * w.hidden) * size,
    }


def study(job: Job, place: Place) -> dict[str, Any]:
    """Return the memory of every candidate that can do the workload, on one rank."""
    workload = job.workload
    given = material(workload, seed=job.seed)
    left_out = reasons(workload, Effort(excluded=dict(job.excluded)))
    measured: dict[str, dict[str, int]] = {}
    for candidate in CANDIDATES:
        if candidate.name in left_out:
            continue
        place.say(candidate.name)
        measured[candidate.name] = asdict(of_layer(candidate.build(workload, given, place.world), given))
    there_before = 2 * given.x_TD.numel() * given.x_TD.element_size()
    dense = workload.tokens * workload.experts * max(torch.bincount(given.expert_TK.flatten()).tolist())
    return {
        "workload": asdict(workload),
        "there_before": there_before,
        "needed": needed(workload),
        "measured": measured,
        "tokens_experts_capacity": dense * workload.torch_dtype.itemsize,
        "left_out": left_out,
    }
