"""Refusals of parts of the user's DeepSpeed configuration, each with its reason, before any group exists.

DeepSpeed itself would reject some of it late, ignore some, and compute something wrong with the rest.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_moe.engine.deepspeed.config import (
    DeepSpeedSection,
    complete_deepspeed_section,
    import_deepspeed,
    is_adam,
    lookup,
    offloads_optimizer,
    uses_torch_adam,
    zero_stage,
)
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A refused value of ``field``, a dotted key. ``when``: whether the value breaks something. ``because``: why."""

    field: str
    when: Callable[[Any], bool]
    because: str


def _is_false(value: Any) -> bool:
    return str(value).lower() in ("false", "0", "no", "off")


def _is_on(value: Any) -> bool:
    return bool(value.get("enabled", True) if isinstance(value, dict) else value)


OFFLOADS = ("offload_optimizer", "offload_param")
_OWN_BATCH = (
    "it follows from train.batch_size, the number of ranks and deepspeed.gradient_accumulation_steps; "
    "set train.batch_size"
)
_NO_DISK = "it needs a library of the system and is compiled on first use; use cpu, or leave it out"
_NO_EXPERTS = "DeepSpeed has it for dense models only"
_NO_TIMERS = "its timers do not see the model's outputs"

_SWITCHES_THAT_STAY_OFF = {
    "zero_optimization.elastic_checkpoint": "DeepSpeed cannot restore it; our checkpoints load at any number of ranks "
    "without it",
    "zero_optimization.offload_optimizer.super_offload": "it runs on few GPUs only",
    "zero_optimization.zero_quantized_weights": _NO_EXPERTS,
    "zero_optimization.zero_quantized_nontrainable_weights": _NO_EXPERTS,
    "zero_optimization.zero_quantized_gradients": _NO_EXPERTS,
    "zero_optimization.round_robin_gradients": "DeepSpeed then takes one parameter's master for another's, and "
    "checkpoints would be wrong",
    "zero_optimization.legacy_stage1": "DeepSpeed has dropped it",
    "bf16.bf16_master_weights_and_grads": "masters are fp32, in checkpoints too",
    "bf16.bf16_optimizer_states": "moments are fp32, in checkpoints too",
    "compile.deepcompile": "it compiles passes of its own on first use",
    "prescale_gradients": "experts are averaged without it",
    "wall_clock_breakdown": _NO_TIMERS,
    "flops_profiler.enabled": _NO_TIMERS,
    "checkpoint.load_universal": "checkpoints are written and read by dist_moe",
    "expert_parallel": "experts are split by parallel.expert_parallel_size",
    "tensor_parallel": "tensor parallelism is not supported",
    "use_data_before_expert_parallelism": "expert-parallel ranks are neighbours here, so that they share a machine",
}
_SWITCHES_THAT_STAY_ON = {
    "managed_gradient_accumulation": "the training loop relies on it",
    "zero_optimization.contiguous_gradients": "DeepSpeed then computes wrong gradients for experts",
    "zero_optimization.reduce_scatter": "DeepSpeed needs it for experts",
    "zero_optimization.compute_grad_norm": "every step records the norm",
    "bf16.check_grad_overflow": "a step whose gradient is not finite would then be taken",
}
_FIELDS_THAT_STAY_UNSET = {
    "train_batch_size": _OWN_BATCH,
    "train_micro_batch_size_per_gpu": _OWN_BATCH,
    "zero_optimization.cpu_offload": "it is a former name; use offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "it is a former name; use offload_param: {device: cpu}",
    "activation_checkpointing": "it is for models that call DeepSpeed's own checkpointing; set "
    "model.activation_checkpointing=true",
    "zero_optimization.zenflow": "it applies some gradients late; leave it out",
    "data_types.buffer_dtype": "tables and counts are kept in buffers, as they are; leave it out",
}
_NUMBERS_THAT_STAY = {
    "zero_optimization.offload_optimizer.ratio": (
        1,
        "the part on the GPU needs an optimizer that DeepSpeed compiles",
    ),
    "zero_optimization.zero_hpz_partition_size": (1, _NO_EXPERTS),
    "zero_optimization.stage3_module_granularity_threshold": (0, "it would gather gates and experts together"),
    "gradient_predivide_factor": (1, "experts are averaged without it"),
    "sequence_parallel_size": (1, "sequence parallelism is not supported"),
}


def _is_not(default: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value != default)


REFUSALS = (
    *(Refusal(field, _is_on, f"{why}; leave it out") for field, why in _SWITCHES_THAT_STAY_OFF.items()),
    *(Refusal(field, _is_false, f"{why}; leave it out (true)") for field, why in _SWITCHES_THAT_STAY_ON.items()),
    *(Refusal(field, _is_not(None), why) for field, why in _FIELDS_THAT_STAY_UNSET.items()),
    *(Refusal(f, _is_not(n), f"{why}; leave it out ({n})") for f, (n, why) in _NUMBERS_THAT_STAY.items()),
    *(Refusal(f"zero_optimization.{part}.device", lambda v: v == "nvme", _NO_DISK) for part in OFFLOADS),
    Refusal("gradient_allreduce_op", _is_not("mean"), "experts are always averaged; use mean"),
    Refusal("zero_optimization.stage", lambda v: v not in (0, 1, 2, 3), "allowed are 0, 1, 2 and 3"),
    Refusal(
        "data_types.grad_accum_dtype", lambda v: v not in ("fp32", "bf16", "fp16"), "allowed are fp32, bf16 and fp16"
    ),
    Refusal(
        "gradient_clipping",
        lambda v: isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < math.inf,
        "it must be a number >= 0; 0 means no clipping",
    ),
)

_MAPPINGS = ("zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params")
# fmt: off
_KNOWN_KEYS = (
    "optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "data_types", "torch_autocast", "gradient_clipping",
    "gradient_accumulation_steps", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
    "sparse_gradients", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler",
    "comms_logger", "activation_checkpointing", "tensorboard", "csv_monitor", "wandb", "compile", "checkpoint",
    "timers",
)
# fmt: on
_UNSUITED_OPTIMIZERS = ("LBFGS", "SparseAdam", "Muon", "Optimizer")
_ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


def check_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> None:
    """Raise UserError for what DeepSpeed would reject, or accept and get wrong. Needs no process group."""
    _check_spelling(section)
    for refusal in REFUSALS:
        value = lookup(section, refusal.field)
        given = value is not None or (refusal.field in section and refusal.field == "gradient_clipping")
        if given and refusal.when(value):
            raise UserError(f"deepspeed.{refusal.field}={_shown(value)} is refused: {refusal.because}")
    _check_precision(section)
    _check_offload(section)
    _check_mappings(section)
    _check_batch(section, batch_size, world_size)
    _check_by_deepspeed(section)
    _check_schedule(section, optimizer_on_one_number(section))


def _check_spelling(section: DeepSpeedSection) -> None:
    """DeepSpeed ignores keys that it does not know; those that look like a known one are mistakes."""
    for key in section:
        near = difflib.get_close_matches(str(key), _KNOWN_KEYS, n=1, cutoff=0.85)
        if near and key not in _KNOWN_KEYS:
            raise UserError(f"deepspeed.{key}: there is no such key; did you mean deepspeed.{near[0]}?")


def _check_precision(section: DeepSpeedSection) -> None:
    if lookup(section, "data_types.grad_accum_dtype") not in (None, "fp32") and zero_stage(section) == 0:
        raise UserError("deepspeed.data_types.grad_accum_dtype at ZeRO stage 0 must be fp32; use stage 1, 2 or 3")
    bf16, fp16 = (_is_on(section.get(name, False)) for name in ("bf16", "fp16"))
    if fp16 and not torch.cuda.is_available():
        raise UserError("deepspeed.fp16 is refused: there is no GPU and CPUs train in fp32 or bf16 only")
    if bf16 and zero_stage(section) == 0:
        raise UserError(
            "deepspeed.bf16 with deepspeed.zero_optimization.stage=0 is refused: DeepSpeed takes one "
            "optimizer step without gradients there; use stage 1, 2 or 3"
        )


def _check_offload(section: DeepSpeedSection) -> None:
    for part, least in zip(OFFLOADS, (1, 3), strict=True):
        field = f"deepspeed.zero_optimization.{part}"
        device = lookup(section, f"zero_optimization.{part}.device")
        if device not in (None, "none", "cpu"):
            raise UserError(f"{field}.device={device} is refused: allowed are cpu and none")
        if device == "cpu" and zero_stage(section) < least:
            stages = "1, 2 or 3" if least == 1 else "3"
            raise UserError(f"{field} with ZeRO stage {zero_stage(section)} is refused: it needs stage {stages}")
    if offloads_optimizer(section) and zero_stage(section) == 3 and section.get("gradient_accumulation_steps", 1) != 1:
        raise UserError(
            "deepspeed.gradient_accumulation_steps with deepspeed.zero_optimization.offload_optimizer at ZeRO stage 3 "
            "is refused: DeepSpeed accumulates wrong gradients there; use stage 1 or 2, or a single micro-batch"
        )
    if _is_false(lookup(section, "optimizer.params.torch_adam")) and uses_torch_adam(section):
        raise UserError(
            "deepspeed.optimizer.params.torch_adam=false is refused: DeepSpeed's own Adam for CPUs is compiled on "
            "first use, and a killed build leaves a lock for which later runs wait for ever; leave it out (true)"
        )


def _check_mappings(section: DeepSpeedSection) -> None:
    for field in _MAPPINGS:
        *above, last = field.split(".")
        holder = lookup(section, above[0]) if above else section
        if isinstance(holder, dict) and last in holder and not isinstance(holder[last], dict):
            raise UserError(
                f"deepspeed.{field}={_shown(holder[last])} must hold 'key: value' pairs"
                + (", among them its type, for example type: AdamW" if field == "optimizer" else "")
            )


def _check_batch(section: DeepSpeedSection, batch_size: int, world_size: int) -> None:
    accumulation = section.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise UserError(f"deepspeed.gradient_accumulation_steps={accumulation!r} must be a whole number >= 1")
    if batch_size % (world_size * accumulation):
        raise UserError(
            f"train.batch_size={batch_size} is not divisible by {world_size} rank(s) x "
            f"deepspeed.gradient_accumulation_steps={accumulation}; use a multiple of {world_size * accumulation}"
        )
    if not isinstance(lookup(section, "optimizer.type"), str):
        raise UserError(
            "deepspeed.optimizer is missing its type; for example "
            "deepspeed.optimizer.type=AdamW deepspeed.optimizer.params.lr=0.001"
        )


def optimizer_on_one_number(section: DeepSpeedSection) -> torch.optim.Optimizer:
    """Return the optimizer over a single parameter; UserError for what is wrong with its own parameters."""
    name, params = section["optimizer"]["type"], section["optimizer"].get("params", {})
    canonical = {"adam": "AdamW", "adamw": "AdamW"}.get(name.lower(), name)
    kind = getattr(torch.optim, canonical, None)
    if not isinstance(kind, type) or canonical in _UNSUITED_OPTIMIZERS or not issubclass(kind, torch.optim.Optimizer):
        raise UserError(
            f"deepspeed.optimizer.type={name} is refused: allowed are AdamW, Adam and the others of torch.optim, "
            f"except {', '.join(_UNSUITED_OPTIMIZERS[:-1])}"
        )
    own = {key: value for key, value in params.items() if not (is_adam(name) and key in _ADAM_SWITCHES)}
    try:
        return kind([torch.nn.Parameter(torch.zeros(1))], **own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"deepspeed.optimizer.params={_shown(params)} do not suit {name}: {error}") from error


def _check_schedule(section: DeepSpeedSection, optimizer: torch.optim.Optimizer) -> None:
    """Build the schedule on that optimizer."""
    scheduler = section.get("scheduler")
    if scheduler is None:
        return
    schedules = import_deepspeed().runtime.lr_schedules
    name, params = scheduler.get("type"), scheduler.get("params", {})
    kind = getattr(schedules, str(name), None) if name in schedules.VALID_LR_SCHEDULES else None
    kind = kind or getattr(torch.optim.lr_scheduler, str(name), None)
    if kind is None:
        allowed = ", ".join(schedules.VALID_LR_SCHEDULES)
        raise UserError(f"deepspeed.scheduler.type={name} is refused: allowed are {allowed} and torch's")
    try:
        kind(optimizer, **params)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"deepspeed.scheduler.params={_shown(params)} do not suit {name}: {error}") from error


def _check_by_deepspeed(section: DeepSpeedSection) -> None:
    """Let DeepSpeed parse it, as for one rank: its parser needs no process group."""
    accumulation = section.get("gradient_accumulation_steps", 1)
    completed = complete_deepspeed_section(section, batch_size=accumulation, world_size=1)
    try:
        import_deepspeed().DeepSpeedConfig(completed)
    except Exception as error:
        raise UserError(f"DeepSpeed refuses the section deepspeed: {error}") from error


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
