"""The user's DeepSpeed configuration: what is passed through, what is completed, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_moe.engine.deepspeed_setup import import_deepspeed
from dist_moe.errors import UserError

DeepSpeedSection = dict[str, Any]


@dataclass(frozen=True)
class _Refusal:
    """``field``: dotted key. ``when``: whether its value breaks something. ``because``: the sentence."""

    field: str
    when: Callable[[Any], bool]
    because: str


def _is_set(value: Any) -> bool:
    return value is not None


def _is_false(value: Any) -> bool:
    return value is False


def _is_on(value: Any) -> bool:
    return bool(value.get("enabled", True) if isinstance(value, dict) else value)


_OWN_BATCH = "it follows from train.batch_size, the number of ranks and deepspeed.gradient_accumulation_steps"
_REFUSALS = (
    _Refusal("train_batch_size", _is_set, f"{_OWN_BATCH}; set train.batch_size"),
    _Refusal("train_micro_batch_size_per_gpu", _is_set, f"{_OWN_BATCH}; set train.batch_size"),
    _Refusal("managed_gradient_accumulation", _is_false, "the training loop relies on it; leave it out"),
    _Refusal("gradient_allreduce_op", lambda v: v != "mean", "experts are always averaged; use mean"),
    _Refusal("zero_optimization.stage", lambda v: v == 3, "ZeRO stage 3 is not supported yet; use 0, 1 or 2"),
    _Refusal("zero_optimization.stage", lambda v: v not in (0, 1, 2, 3), "allowed are 0, 1 and 2"),
    _Refusal(
        "zero_optimization.contiguous_gradients",
        _is_false,
        "DeepSpeed then computes wrong gradients for experts; leave it out (true)",
    ),
    _Refusal("zero_optimization.reduce_scatter", _is_false, "DeepSpeed needs it for experts; leave it out (true)"),
    _Refusal(
        "zero_optimization.elastic_checkpoint",
        _is_on,
        "DeepSpeed cannot restore it; our checkpoints load at any number of ranks without it",
    ),
    _Refusal(
        "zero_optimization.offload_optimizer",
        lambda v: isinstance(v, dict) and v.get("device", "none") != "none",
        "offload is not supported yet; leave it out",
    ),
    _Refusal("checkpoint.load_universal", _is_on, "checkpoints are written and read by dist_moe; leave it out"),
    _Refusal("expert_parallel", _is_on, "experts are split by parallel.expert_parallel_size; leave it out"),
    _Refusal("tensor_parallel", _is_on, "tensor parallelism is not supported; leave it out"),
    _Refusal("sequence_parallel_size", lambda v: v != 1, "sequence parallelism is not supported; leave it out"),
    _Refusal(
        "use_data_before_expert_parallelism",
        _is_on,
        "expert-parallel ranks are neighbours here, so that they share a machine; leave it out",
    ),
)


def check_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> None:
    """Raise UserError for what DeepSpeed would reject, or accept and get wrong. No process group needed."""
    for refusal in _REFUSALS:
        value = _lookup(section, refusal.field)
        if value is not None and refusal.when(value):
            raise UserError(f"deepspeed.{refusal.field}={_shown(value)} is refused: {refusal.because}")
    _check_precision(section)
    _check_batch(section, batch_size, world_size)
    _check_optimizer(section)
    _check_by_deepspeed(section)


def complete_deepspeed_section(section: DeepSpeedSection, batch_size: int, world_size: int) -> DeepSpeedSection:
    """The configuration that DeepSpeed gets: the user's, plus sizes and what the CPU needs."""
    completed = copy.deepcopy(section)
    accumulation = completed.setdefault("gradient_accumulation_steps", 1)
    completed["train_batch_size"] = batch_size
    completed["train_micro_batch_size_per_gpu"] = batch_size // (world_size * accumulation)
    completed["zero_allow_untested_optimizer"] = True
    completed.setdefault("steps_per_print", 2**31 - 1)
    optimizer = completed["optimizer"]
    if optimizer["type"].lower() in ("adam", "adamw") and not torch.cuda.is_available():
        # DeepSpeed's own CPU Adam is compiled on first use, which takes a minute and a C++ compiler.
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    return completed


def zero_stage(section: DeepSpeedSection) -> int:
    return int(_lookup(section, "zero_optimization.stage") or 0)


def _check_precision(section: DeepSpeedSection) -> None:
    bf16, fp16 = (_is_on(section.get(name, False)) for name in ("bf16", "fp16"))
    if fp16 and not torch.cuda.is_available():
        raise UserError("deepspeed.fp16 is refused: there is no GPU and CPUs train in fp32 or bf16 only")
    if bf16 and zero_stage(section) == 0:
        raise UserError(
            "deepspeed.bf16 with deepspeed.zero_optimization.stage=0 is refused: DeepSpeed takes one "
            "optimizer step without gradients there; use stage 1 or 2"
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


def _check_optimizer(section: DeepSpeedSection) -> None:
    optimizer = section.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise UserError(
            "deepspeed.optimizer is missing its type; for example "
            "deepspeed.optimizer.type=AdamW deepspeed.optimizer.params.lr=0.001"
        )
    name = optimizer["type"]
    if name.lower() in ("onebitadam", "onebitlamb", "zerooneadam", "lamb", "lion") or (
        name.lower() not in ("adam", "adamw", "muon") and not hasattr(torch.optim, name)
    ):
        raise UserError(
            f"deepspeed.optimizer.type={name} is refused: allowed are AdamW, Adam, Muon and any of torch.optim"
        )


def _check_by_deepspeed(section: DeepSpeedSection) -> None:
    """Let DeepSpeed parse it, as for one rank: its parser needs no process group."""
    parse = import_deepspeed().DeepSpeedConfig
    try:
        parse(
            complete_deepspeed_section(section, batch_size=section.get("gradient_accumulation_steps", 1), world_size=1)
        )
    except Exception as error:
        raise UserError(f"DeepSpeed refuses the section deepspeed: {error}") from error


def _lookup(section: DeepSpeedSection, dotted: str) -> Any:
    value: Any = section
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
