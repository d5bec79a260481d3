"""In which precision a run computes: DeepSpeed casts the parameters, and an evaluation has to cast them alike."""

from __future__ import annotations

import torch
from torch import nn

from dist_moe.engine.deepspeed.config import DeepSpeedSection, lookup


def parameter_dtype(section: DeepSpeedSection) -> torch.dtype:
    """Of the parameters that a run with this DeepSpeed configuration computes with; its masters are fp32."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if lookup(section, f"{name}.enabled"):
            return dtype
    return torch.float32


def cast_parameters(model: nn.Module, section: DeepSpeedSection, device: torch.device) -> None:
    """Give a bare model the parameters that DeepSpeed would give it; buffers stay as they are, as they do there.

    An fp16 run away from a GPU gets fp32: CPUs have no fp16 arithmetic to repeat it with.
    """
    dtype = parameter_dtype(section)
    if dtype == torch.float16 and device.type == "cpu":
        dtype = torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
