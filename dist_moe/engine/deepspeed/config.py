"""DeepSpeed without its surprises, and the user's configuration of it, completed: sizes, CPU, precision."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from dist_moe.errors import UserError

DeepSpeedSection = dict[str, Any]


def import_deepspeed() -> Any:
    """Return the ``deepspeed`` module, quiet, and without the shared-memory op.

    DeepSpeed compiles that op at the first ``init_distributed``: half a minute, a C++ compiler, a
    lock that hangs later runs if the build is killed, 66 MiB per rank left in /dev/shm. Only tensor
    parallel inference uses it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    _import_muon_uncompiled()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without ``torch.compile`` on its functions, which would import inductor: 3 to 5 s.

    Every ZeRO engine imports it, to ask whether its optimizer is a Muon; ours never is.
    """
    from deepspeed.runtime import compiler

    compile_at_once, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # DeepSpeed does without it, too
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_at_once


def complete_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> DeepSpeedSection:
    """Return the configuration that DeepSpeed gets; ``section`` is left as it is."""
    completed = copy.deepcopy(section)
    accumulation = completed.setdefault("gradient_accumulation_steps", 1)
    completed["train_batch_size"] = batch_size
    completed["train_micro_batch_size_per_gpu"] = batch_size // (world_size * accumulation)
    completed["zero_allow_untested_optimizer"] = True
    completed.setdefault("steps_per_print", 2**31 - 1)
    completed.setdefault("gradient_clipping", 0.0)  # DeepSpeed would clip at 1 unasked
    completed["optimizer"] = complete_optimizer(section["optimizer"])
    if offloads_optimizer(section):
        completed["zero_force_ds_cpu_optimizer"] = False  # else torch's optimizers are refused
    return completed


def complete_optimizer(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``optimizer`` with the defaults of this house; it is left as it is.

    Adam is torch's, everywhere, unless ``torch_adam: false`` asks for DeepSpeed's, which is compiled first. It decays
    no weights unasked, and takes one pass over masters and moments where nothing else is asked for.
    """
    completed = copy.deepcopy(optimizer)
    if is_adam(optimizer["type"]):
        params = completed.setdefault("params", {})
        params.setdefault("weight_decay", 0.0)  # torch's AdamW would decay by 0.01, DeepSpeed's not
        params.setdefault("torch_adam", True)
        if params["torch_adam"] and not params.get("foreach"):
            params.setdefault("fused", True)  # a third of the time
    return completed


def offloads_optimizer(section: DeepSpeedSection) -> bool:
    """Return whether optimizer state lies in host memory."""
    return lookup(section, "zero_optimization.offload_optimizer.device") == "cpu"


def zero_stage(section: DeepSpeedSection) -> int:
    """Return the ZeRO stage, 0 to 3."""
    return int(lookup(section, "zero_optimization.stage") or 0)


def is_adam(optimizer_type: str) -> bool:
    """Return whether DeepSpeed takes ``optimizer_type`` for Adam."""
    return optimizer_type.lower() in ("adam", "adamw")


def lookup(section: DeepSpeedSection, dotted_key: str) -> Any:
    """Return the value under a dotted key, None if it or a section above it is absent."""
    value: Any = section
    for key in dotted_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def is_enabled(section: DeepSpeedSection, name: str) -> bool:
    """Return whether the precision ``name``, bf16 or fp16, is switched on.

    Raises UserError for what is neither true nor false: DeepSpeed would read "auto" as false and "yes" as true.
    """
    enabled = lookup(section, f"{name}.enabled")
    if not (enabled is None or isinstance(enabled, bool)):
        raise UserError(f"deepspeed.{name}.enabled={enabled} is refused: it must be true or false")
    return bool(enabled)


def parameter_dtype(section: DeepSpeedSection) -> torch.dtype:
    """Return the dtype of the parameters that a run computes with; its masters are fp32. Raises UserError."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if is_enabled(section, name):
            return dtype
    return torch.float32


def cast_parameters(model: nn.Module, section: DeepSpeedSection, device: torch.device) -> None:
    """Cast the parameters of a bare model as DeepSpeed would, as an evaluation has to; buffers stay as they are.

    An fp16 run away from a GPU gets fp32: CPUs have no fp16 arithmetic to repeat it with.
    """
    dtype = parameter_dtype(section)
    if dtype == torch.float16 and device.type == "cpu":
        dtype = torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
