"""A DeepSpeed engine that knows our experts.

DeepSpeed decides by attributes of a parameter and by one flag of the engine which parameters are
experts: those are reduced and partitioned over their expert-data-parallel group, the others over
all ranks. Both kinds of gradient are divided by the number of all ranks, so that the result is the
gradient of the mean over ranks of the ranks' losses.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import DeepSpeedSection, import_deepspeed
from dist_moe.engine.deepspeed.optimizers import build_optimizer
from dist_moe.engine.deepspeed.parameter_state import MASTER, read_state
from dist_moe.engine.deepspeed.schedules import Schedule
from dist_moe.engine.deepspeed.sharded_parameters import (
    check_groups,
    forget_module,
    gather_for_backward,
    keep_tables_whole,
    whole_shape,
)
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.experts import ExpertBank
from dist_moe.layer.ownership import engine_knows_experts

_deepspeed = import_deepspeed()


class ExpertParallelEngine(_deepspeed.DeepSpeedEngine):  # type: ignore[name-defined]
    """``DeepSpeedEngine`` for modules that contain :class:`ExpertBank` parameters.

    Optimizer and schedule are built by :mod:`dist_moe.engine.deepspeed.optimizers` and ``schedules``, the same at every
    ZeRO stage, unless a user's own loop brings others.

    Corrects what DeepSpeed gets wrong at ZeRO stage 0: the norm by which it clips there is the mean
    of the ranks' norms, not the norm of all gradients. At stage 3, which DeepSpeed offers for experts of
    its own only, see :mod:`dist_moe.engine.deepspeed.sharded_parameters`.
    """

    def __init__(self, model: nn.Module, section: DeepSpeedSection, groups: ProcessGroups, **given: Any) -> None:
        """Wrap ``model``. ``given``: a user's own optimizer, schedule or data, which DeepSpeed's engine takes.

        Where nothing is given, optimizer and schedule of ``section`` are made here, not by DeepSpeed.
        """
        mark_experts(model, groups.expert_group_name)
        self.__dict__["process_groups"] = groups  # before the base class is initialised, as its hooks need them
        self.__dict__["held_masters"] = {}  # see _own_part of parameter_state.py
        theirs = {key: value for key, value in section.items() if given or key != "scheduler"}
        config = _deepspeed.DeepSpeedConfig(theirs)
        if given:
            _deepspeed.set_optimizer_flags(config, model)
        options = {"args": None, "model_parameters": _trained_groups(model), "dist_init_required": False}
        super().__init__(
            **options | (given or {"optimizer": partial(build_optimizer, section)}),
            model=model,
            config=theirs,
            config_class=config,
        )
        if not given:
            self.lr_scheduler = Schedule(section, self.optimizer.param_groups)
        if self.shards_parameters:
            check_groups(model.parameters(), self.group_of)
            self.__dict__["own_hooks"] = gather_for_backward(model)
            keep_tables_whole(self)

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters themselves are spread over ranks (ZeRO stage 3)."""
        return bool(self.zero_optimization_partition_weights())

    @property
    def num_parameters(self) -> int:
        """The number of elements of this rank's parameters, whether it holds all of them or slices."""
        return sum(whole_shape(parameter).numel() for parameter in self.module.parameters())

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients of the last step, dense and expert, before clipping."""
        return float(self.get_global_grad_norm())

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was left out because a gradient was not finite, which all ranks know alike."""
        return not math.isfinite(self.grad_norm)

    def _configure_distributed_model(self, model: nn.Module) -> None:
        experts = [parameter for parameter in model.parameters() if is_expert_parameter(parameter)]
        self.has_moe_layers = bool(experts)  # else DeepSpeed misses their groups
        with engine_knows_experts():
            super()._configure_distributed_model(model)
        if not self.shards_parameters and not any(parameter.requires_grad for parameter in experts):
            self.has_moe_layers = False  # ZeRO stages 1 and 2 insist on a group of trained experts where it is set

    def _validate_zero3_moe_compatibility(self) -> None:
        """DeepSpeed's own check knows its own layers only; ours is :func:`check_groups`, afterwards."""

    def group_of(self, parameter: nn.Parameter) -> Any:
        """Return the process group of the ranks that hold copies of ``parameter``, whose gradients are summed."""
        if is_expert_parameter(parameter):
            return self.expert_data_parallel_group[self.process_groups.expert_group_name]
        return self.seq_data_parallel_group

    def sum_over_copies(self, x: Tensor) -> None:
        """Add ``x`` up, in place, over the ranks that hold copies of this rank's experts. Collective over these."""
        if self.process_groups.copies > 1:
            dist.all_reduce(x, group=self.expert_data_parallel_group[self.process_groups.expert_group_name])

    def destroy(self) -> None:
        """Free what DeepSpeed keeps of this engine beyond its own life."""
        super().destroy()
        if self.shards_parameters:
            for handle in self.own_hooks:
                handle.remove()
            forget_module(self.module)

    def gather_tables(self) -> None:
        """Bring back the parameters that ZeRO stage 3 keeps whole, tables among them, and an evaluation has dropped.

        An evaluation is not the order of modules that DeepSpeed knows from training, and before it knows an order it
        drops whatever a module has used, on all ranks alike. Collective over all ranks.
        """
        dropped = [p for p in self.optimizer.persistent_parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if dropped:
            dropped[0].all_gather(dropped)

    def whole_parameters(self) -> dict[str, Tensor]:
        """Return fp32 copies of all parameters by name: dense ones whole, experts those of this rank. Collective."""
        return {name: read_state(self, p, MASTER).detach().clone() for name, p in self.module.named_parameters()}

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if not self.zero_optimization():
            self._global_grad_norm = global_grad_norm(self.module, self.process_groups)
            if self.step_was_skipped:
                # Left out as DeepSpeed does by itself at ZeRO stages 1 and 2.
                self.zero_grad()
                self.losses = None
                self.skipped_steps += 1
                self.global_steps += 1
                self.global_samples += self.train_batch_size()
                return
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        """Clip at ZeRO stage 0 by the norm of all gradients; DeepSpeed would take the mean of the ranks' norms."""
        scale = (self.gradient_clipping() / (self._global_grad_norm + 1e-6)).clamp(max=1.0)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


def _trained_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters that train for the optimizer: a group of dense ones, then groups of experts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    split = _deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer
    return [group for group in split({"params": trained, "name": "dense-params"}) if group["params"]]


def mark_experts(model: nn.Module, group_name: str) -> None:
    """Put DeepSpeed's attributes on the parameters of every bank of experts in ``model``."""
    for bank in model.modules():
        if isinstance(bank, ExpertBank):
            bank.mark(group_name)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Return whether ``parameter`` is of experts, once :func:`mark_experts` has seen its bank."""
    return not getattr(parameter, "allreduce", True)


def global_grad_norm(model: nn.Module, groups: ProcessGroups) -> Tensor:
    """Return the norm of all gradients: squares of dense ones summed once, of experts over EP ranks.

    Expects gradients that are reduced already, as at ZeRO stage 0 before the optimizer's step.
    """
    squares = torch.zeros(2, device=groups.device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares[int(is_expert_parameter(parameter))] += parameter.grad.float().square().sum()
    squares[1] = groups.world.sum(squares[1])
    return squares.sum().sqrt()
