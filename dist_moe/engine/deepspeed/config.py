"""The user's DeepSpeed configuration, completed: the sizes that follow from ours, what the CPU needs."""

from __future__ import annotations

import copy
from typing import Any

import torch

DeepSpeedSection = dict[str, Any]


def complete_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> DeepSpeedSection:
    """The configuration that DeepSpeed gets; ``section`` is left as it is."""
    completed = copy.deepcopy(section)
    accumulation = completed.setdefault("gradient_accumulation_steps", 1)
    completed["train_batch_size"] = batch_size
    completed["train_micro_batch_size_per_gpu"] = batch_size // (world_size * accumulation)
    completed["zero_allow_untested_optimizer"] = True
    completed.setdefault("steps_per_print", 2**31 - 1)
    completed.setdefault("gradient_clipping", 0.0)  # DeepSpeed would clip at 1 unasked
    optimizer = completed["optimizer"]
    if is_adam(optimizer["type"]):
        params = optimizer.setdefault("params", {})
        params.setdefault("weight_decay", 0.0)  # torch's AdamW would decay by 0.01 unasked, DeepSpeed's not
        if uses_torch_adam(section):
            params.setdefault("torch_adam", True)
            params.setdefault("fused", True)  # one pass over masters and moments, a third of the time
    if offloads_optimizer(section):
        completed["zero_force_ds_cpu_optimizer"] = False  # else torch's optimizers are refused
    return completed


def uses_torch_adam(section: DeepSpeedSection) -> bool:
    """Whether Adam steps on a CPU, where DeepSpeed's own would first be compiled: a minute and a C++ compiler."""
    return not torch.cuda.is_available() or offloads_optimizer(section)


def offloads_optimizer(section: DeepSpeedSection) -> bool:
    return lookup(section, "zero_optimization.offload_optimizer.device") == "cpu"


def zero_stage(section: DeepSpeedSection) -> int:
    return int(lookup(section, "zero_optimization.stage") or 0)


def is_adam(optimizer_type: str) -> bool:
    return optimizer_type.lower() in ("adam", "adamw")


def lookup(section: DeepSpeedSection, dotted_key: str) -> Any:
    """The value under a dotted key, None if it or a section above it is absent."""
    value: Any = section
    for key in dotted_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
