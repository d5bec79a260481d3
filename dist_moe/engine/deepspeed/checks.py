"""Refusals of parts of the user's DeepSpeed configuration, each with its reason, before any group exists.

DeepSpeed itself would reject some of it late, ignore some, and compute something wrong with the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dist_moe.engine.deepspeed.config import (
    DeepSpeedSection,
    complete_deepspeed_section,
    import_deepspeed,
    is_enabled,
    lookup,
    offloads_optimizer,
    zero_stage,
)
from dist_moe.engine.deepspeed.kinds import FLAG, Kind, check_kind, number, one_of, size, suggestion, whole, written
from dist_moe.engine.deepspeed.optimizers import check_optimizer
from dist_moe.engine.deepspeed.schedules import check_schedule
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
    "fp16.fp16_master_weights_and_grads": "masters are fp32, in checkpoints too",
    "compile.deepcompile": "it compiles passes of its own on first use",
    "prescale_gradients": "experts are averaged without it",
    "wall_clock_breakdown": _NO_TIMERS,
    "flops_profiler.enabled": _NO_TIMERS,
    "comms_logger": "it does not see the exchange of tokens",
    **dict.fromkeys(("tensorboard", "csv_monitor", "wandb", "comet"), "records are written by trackers"),
    "torch_autocast": "an evaluation would not repeat it (bf16 is repeated)",
    "zero_force_ds_cpu_optimizer": "optimizers are torch's",
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
)

_DTYPE = one_of("fp32", "bf16", "fp16")
_SOME_ELEMENTS = size(0, sys.maxsize)
_CHECKED_APART = Kind("checked by its own function", lambda _: True)
_ZERO: dict[str, Kind] = {
    "stage": one_of(0, 1, 2, 3),
    "overlap_comm": FLAG,
    "reduce_bucket_size": size(1),
    "allgather_partitions": FLAG,
    "allgather_bucket_size": Kind("an even whole number >= 2", lambda v: size(2).holds(v) and v % 2 == 0),
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "ignore_unused_parameters": FLAG,
    "sub_group_size": size(1, sys.maxsize),
    "stage3_prefetch_bucket_size": size(0),
    "stage3_param_persistence_threshold": _SOME_ELEMENTS,
    "stage3_model_persistence_threshold": _SOME_ELEMENTS,
    "stage3_max_live_parameters": _SOME_ELEMENTS,
    "stage3_max_reuse_distance": _SOME_ELEMENTS,
    "stage3_gather_16bit_weights_on_model_save": FLAG,
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    **{f"{part}.device": one_of("none", "cpu") for part in OFFLOADS},
    **{f"{part}.pin_memory": FLAG for part in OFFLOADS},
}
FIELDS: dict[str, Kind] = {
    "optimizer.type": _CHECKED_APART,
    "optimizer.params": _CHECKED_APART,
    "scheduler.type": _CHECKED_APART,
    "scheduler.params": _CHECKED_APART,
    "gradient_accumulation_steps": whole(1),
    "gradient_clipping": number(">= 0 (0 means no clipping)", lambda v: v >= 0),
    "communication_data_type": _DTYPE,
    "steps_per_print": whole(1),
    "zero_allow_untested_optimizer": FLAG,
    "data_types.grad_accum_dtype": _DTYPE,
    "bf16.enabled": FLAG,
    "bf16.immediate_grad_update": FLAG,
    "fp16.enabled": FLAG,
    "fp16.auto_cast": FLAG,
    "fp16.loss_scale": number(">= 0 (0 means that it follows overflows)", lambda v: v >= 0),
    "fp16.initial_scale_power": whole(0, 32),
    "fp16.loss_scale_window": whole(1),
    "fp16.hysteresis": whole(1),
    "fp16.consecutive_hysteresis": FLAG,
    "fp16.min_loss_scale": whole(1),
    **{f"zero_optimization.{key}": kind for key, kind in _ZERO.items()},
}
"""Every field that may be set, beside the harmless values of those in REFUSALS, and the kind of its values."""


def check_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> None:
    """Raise UserError for what DeepSpeed would reject, or accept and get wrong. Needs no process group."""
    refusals = {refusal.field: refusal for refusal in REFUSALS}
    for field, value in _leaves(section, FIELDS.keys() | refusals.keys()):
        _check_not_auto(field, value)
        if field in refusals and value is not None and refusals[field].when(value):
            raise UserError(f"deepspeed.{field}={written(value)} is refused: {refusals[field].because}")
        if field in FIELDS:
            check_kind(field, value, FIELDS[field])
    _check_precision(section)
    _check_offload(section)
    _check_batch(section, batch_size, world_size)
    check_optimizer(section)
    check_schedule(section)
    _check_by_deepspeed(section)


def _leaves(section: DeepSpeedSection, known: set[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every field that is set. Raises UserError for one that is not ``known``."""
    for key, value in section.items():
        field = f"{above}{key}"
        if field in known:
            yield field, value
        elif any(one.startswith(f"{field}.") for one in known):
            if isinstance(value, dict):
                yield from _leaves(value, known, f"{field}.")
            elif value is not None or field.rpartition(".")[2] not in OFFLOADS:
                raise UserError(
                    f"deepspeed.{field}={written(value)} must hold 'key: value' pairs"
                    + (", among them its type, for example type: AdamW" if field == "optimizer" else "")
                )
        else:
            beside = dict.fromkeys(one[len(above) :].split(".")[0] for one in FIELDS if one.startswith(above))
            raise UserError(f"deepspeed.{field}: there is no such key; {suggestion(key, beside or known)}")


def _check_not_auto(field: str, value: Any) -> None:
    """Other programs fill in "auto"; DeepSpeed takes its default for it, whatever that is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_not_auto(f"{field}.{key}", inner)
    elif isinstance(value, str) and value.lower() == "auto":
        raise UserError(f"deepspeed.{field}=auto is refused: nothing fills it in here; give a value, or leave it out")


def _check_precision(section: DeepSpeedSection) -> None:
    if lookup(section, "data_types.grad_accum_dtype") not in (None, "fp32") and zero_stage(section) == 0:
        raise UserError("deepspeed.data_types.grad_accum_dtype at ZeRO stage 0 must be fp32; use stage 1, 2 or 3")
    for name in ("bf16", "fp16"):
        if not is_enabled(section, name):
            continue
        if name == "fp16" and not torch.cuda.is_available():
            raise UserError("deepspeed.fp16.enabled=true is refused: there is no GPU; CPUs train in fp32 or bf16 only")
        if zero_stage(section) == 0:
            raise UserError(
                f"deepspeed.{name}.enabled=true with deepspeed.zero_optimization.stage=0 is refused: DeepSpeed takes "
                "one optimizer step without gradients there; use stage 1, 2 or 3"
            )


def _check_offload(section: DeepSpeedSection) -> None:
    for part, least in zip(OFFLOADS, (1, 3), strict=True):
        field = f"deepspeed.zero_optimization.{part}"
        device = lookup(section, f"zero_optimization.{part}.device")
        if device == "cpu" and zero_stage(section) < least:
            stages = "1, 2 or 3" if least == 1 else "3"
            raise UserError(f"{field} with ZeRO stage {zero_stage(section)} is refused: it needs stage {stages}")
    if offloads_optimizer(section) and zero_stage(section) == 3 and section.get("gradient_accumulation_steps", 1) != 1:
        raise UserError(
            "deepspeed.gradient_accumulation_steps with deepspeed.zero_optimization.offload_optimizer at ZeRO stage 3 "
            "is refused: DeepSpeed accumulates wrong gradients there; use stage 1 or 2, or a single micro-batch"
        )


def _check_batch(section: DeepSpeedSection, batch_size: int, world_size: int) -> None:
    accumulation = section.get("gradient_accumulation_steps", 1)
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


def _check_by_deepspeed(section: DeepSpeedSection) -> None:
    """Let DeepSpeed parse it, as for one rank where there is no process group: its parser needs none."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    accumulation = section.get("gradient_accumulation_steps", 1)
    completed = complete_deepspeed_section(section, batch_size=accumulation * ranks, world_size=ranks)
    try:
        import_deepspeed().DeepSpeedConfig(completed)
    except Exception as error:
        raise UserError(f"DeepSpeed refuses the section deepspeed: {error}") from error
