"""A user's own DeepSpeed around models with split experts: ``initialize`` in place of ``deepspeed.initialize``.

DeepSpeed reduces and partitions experts apart from the rest if its engine knows of them, and it knows layers of its
own only. The engine here is that of :func:`dist_moe.fit`, which knows ours: expert gradients are summed over copies and
divided by the number of all ranks, as dense ones are, and the norm that clips is that of all gradients at every ZeRO
stage. Importing this module is enough for DeepSpeed to start on machines without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_moe.config.files import read_json_object
from dist_moe.engine.deepspeed.checks import REFUSALS
from dist_moe.engine.deepspeed.config import DeepSpeedSection, import_deepspeed, lookup
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.errors import UserError
from dist_moe.layer import MoE
from dist_moe.parallel import ProcessWorld, SingleWorld, World

__all__ = ["UsersEngine", "import_deepspeed", "initialize", "split_optimizer_groups"]

_WRONG_FOR_EXPERTS = (
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.stage3_module_granularity_threshold",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "expert_parallel",
    "tensor_parallel",
    "sequence_parallel_size",
    "use_data_before_expert_parallelism",
)
"""Fields of DeepSpeed's configuration with which experts would be wrong: some of those that a run refuses."""


class UsersEngine(ExpertParallelEngine):
    """The engine that :func:`initialize` returns: DeepSpeed's, which knows our experts."""

    def save_checkpoint(self, *arguments: Any, **options: Any) -> Any:
        """Save as DeepSpeed does at ZeRO stage 3; RuntimeError at other stages."""
        self._check_stage("save_checkpoint")
        return super().save_checkpoint(*arguments, **options)

    def load_checkpoint(self, *arguments: Any, **options: Any) -> Any:
        """Load as DeepSpeed does at ZeRO stage 3; RuntimeError at other stages."""
        self._check_stage("load_checkpoint")
        return super().load_checkpoint(*arguments, **options)

    def _check_stage(self, method: str) -> None:
        if not self.shards_parameters:
            raise RuntimeError(
                f"engine.{method} of DeepSpeed keeps the experts of one rank alone at ZeRO stage "
                f"{self.zero_optimization_stage()}: let every rank keep what "
                f"dist_moe.engine.deepspeed.parameter_state.read_parameter_state(engine) returns, and give it back by "
                f"write_parameter_state(engine, state); or use stage 3"
            )


def initialize(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    lr_scheduler: Any = None,
    training_data: Any = None,
    collate_fn: Callable[..., Any] | None = None,
) -> tuple[UsersEngine, Any, Any, Any]:
    """Return (engine, optimizer, data loader, schedule), as ``deepspeed.initialize`` does with the same arguments.

    ``model``: its :class:`dist_moe.MoE` layers have worlds of neighbouring ranks, equally many. ``config``: that of
    DeepSpeed, or the path of its JSON file. ``optimizer``: None where ``config`` names one, over ``model_parameters``
    (None: all that are trained). A given one's groups are divided into dense parameters and experts; a schedule has to
    be made from it afterwards, by a function given as ``lr_scheduler``, or after :func:`split_optimizer_groups`.

    Starts on machines without a GPU, too, where a plain ``deepspeed.initialize`` first compiles an operation that
    no training uses, or waits for ever for a build that was killed. DeepSpeed's checkpoints hold all experts at ZeRO
    stage 3 only; at lower stages the engine refuses to write or read them.

    Raises UserError for fields of ``config`` with which experts' gradients would be wrong, and for worlds that are not
    the groups which DeepSpeed makes. Collective over all ranks.
    """
    section = dict(config) if isinstance(config, Mapping) else read_json_object(Path(config))
    _check(section)
    groups = _groups_of(model)
    given: dict[str, Any] = {"training_data": training_data, "collate_fn": collate_fn, "lr_scheduler": lr_scheduler}
    if optimizer is not None:
        split_optimizer_groups(optimizer, model)
        _check_schedule(lr_scheduler, optimizer)
        given["optimizer"] = optimizer
    if model_parameters is not None:
        given["model_parameters"] = list(model_parameters)
    engine = UsersEngine(model, section, groups, **given)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def split_optimizer_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Divide each parameter group of ``optimizer`` into dense parameters and experts, as DeepSpeed wants them.

    The parts keep the options of their group. Nothing changes the second time. Call it before a schedule is made.
    """
    names = {p: f"ep_size_{layer.world.size}" for layer in _layers(model) for p in layer.experts.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for name in dict.fromkeys(names.get(parameter) for parameter in group["params"]):
            params = [parameter for parameter in group["params"] if names.get(parameter) == name]
            groups.append(group | {"params": params} | ({} if name is None else {"name": name, "moe": True}))
    optimizer.param_groups[:] = groups


def _layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _check(section: DeepSpeedSection) -> None:
    for refusal in REFUSALS:
        value = lookup(section, refusal.field)
        if refusal.field in _WRONG_FOR_EXPERTS and value is not None and refusal.when(value):
            raise UserError(f"{refusal.field}={value} in DeepSpeed's configuration is refused: {refusal.because}")
    stage = lookup(section, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage={stage} in DeepSpeed's configuration is refused: allowed are 0 to 3")
    if lookup(section, "bf16.enabled") and not stage:
        raise UserError(
            "bf16 with zero_optimization.stage=0 in DeepSpeed's configuration is refused: DeepSpeed takes one "
            "optimizer step without gradients there; use stage 1, 2 or 3"
        )


def _check_schedule(lr_scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    rates = getattr(lr_scheduler, "base_lrs", None)
    if rates is not None and len(rates) != len(optimizer.param_groups):
        raise UserError(
            f"lr_scheduler was made for {len(rates)} parameter group(s) of the optimizer, which has "
            f"{len(optimizer.param_groups)} now that experts have groups of their own; give a function optimizer -> "
            f"schedule, or call split_optimizer_groups(optimizer, model) before you make it"
        )


def _groups_of(model: nn.Module) -> ProcessGroups:
    """Return DeepSpeed's groups for the worlds of the layers of ``model``, made if there are none yet."""
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        raise UserError(
            "no process group is open: call torch.distributed.init_process_group before you build the model"
        )
    environment = LaunchEnvironment(dist.get_rank(), dist.get_world_size(), _local_rank(), launched=True)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    worlds: list[World] = [layer.world for layer in _layers(model)] or [SingleWorld()]
    size = worlds[0].size
    if any(world.size != size for world in worlds):
        raise UserError(
            f"layers split their experts over {sorted({world.size for world in worlds})} ranks, but one engine of "
            f"DeepSpeed can have one number only; give all layers the same world"
        )
    groups, name = deepspeed.utils.groups, f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    ranks = dist.get_process_group_ranks(groups._get_expert_parallel_group(name))
    for world in worlds:
        own = dist.get_process_group_ranks(world.group) if isinstance(world, ProcessWorld) else ranks
        if own != ranks:
            raise UserError(
                f"the world of a layer has the ranks {own}, but DeepSpeed splits experts over neighbours: make it of "
                f"the ranks {ranks}"
            )
    with_copies = groups._get_expert_data_parallel_group(name)
    copy, copies = dist.get_rank(with_copies), dist.get_world_size(with_copies)
    return ProcessGroups(environment, size, worlds[0], copy=copy, copies=copies)


def _local_rank() -> int:
    """Return LOCAL_RANK, which DeepSpeed reads from the environment; without a launcher, the rank itself."""
    return int(os.environ.setdefault("LOCAL_RANK", str(dist.get_rank())))
