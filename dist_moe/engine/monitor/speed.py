"""How fast a run is: examples and tokens per second, share of what the devices can do, memory in use."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_moe.recording import record

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}
"""FLOP/s of dense matrix products in 16 bits by the device's name, from NVIDIA's data sheets."""


def describe_speed(
    records: Sequence[dict[str, Any]], model: nn.Module, batch_size: int, peak_flops: float | None
) -> None:
    """Add to records ``examples_per_second``, ``tokens_per_second`` and, where model and device tell, ``mfu``.

    ``batch_size``: examples of a step. ``peak_flops``: FLOP/s of all devices together; None: not known. The model's
    FLOPs are those of ``training_flops_per_token`` at the measured experts per token; what activation checkpointing
    computes again does not count.
    """
    flops_of = getattr(model, "training_flops_per_token", None)
    for one in records:
        one["examples_per_second"] = batch_size / one["step_seconds"]
        if "tokens" not in one:
            continue
        one["tokens_per_second"] = one["tokens"] / one["step_seconds"]
        if peak_flops and flops_of and one["tokens"]:
            flops = flops_of(round(one["tokens"] / batch_size), one["active_experts"])
            if flops is not None:
                one["mfu"] = flops * one["tokens_per_second"] / peak_flops


def peak_flops_of(device: torch.device, model: nn.Module, world_size: int) -> float | None:
    """Return FLOP/s of ``world_size`` devices such as this one for a model in 16 bits; None where that is not known."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((world_size * flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def record_memory(device: torch.device) -> None:
    """Record ``peak_memory_gib``: in use at most so far, of the GPU's memory, else of this process's."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record("peak_memory_gib", peak / 2**30, "max")
