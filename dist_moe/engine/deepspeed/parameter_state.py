"""Masters and optimizer state by parameter, whole and in fp32, whatever the ZeRO stage.

This is what makes a checkpoint portable: from stage 1 on DeepSpeed keeps masters and moments, and at
stage 3 the parameters too, as slices of flat buffers spread over ranks; here they are read and written
parameter by parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_moe.engine.deepspeed.optimizers import has_shape
from dist_moe.engine.deepspeed.sharded_parameters import gather_kept, own_slice

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine

MASTER = "master"


@dataclass(frozen=True)
class ParameterState:
    """Masters and optimizer state of a model.

    ``tensors[name]``: the fp32 master under MASTER, then each optimizer state of its shape (for Adam ``exp_avg``,
    ``exp_avg_sq``), which a parameter that is held still has not. ``scalars``: states without a shape (Adam's
    ``step``), which are the same for all parameters.
    """

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, float]


def read_parameter_state(engine: ExpertParallelEngine) -> ParameterState:
    """Return the state of all dense parameters and of this rank's experts. Collective over all ranks."""
    keys, states = state_keys(engine), _optimizer_states(engine)
    scalars = {k: float(v) for k, v in states[0].items() if not has_shape(v)} if states else {}
    tensors = {
        name: {key: read_state(engine, parameter, key) for key in keys if key == MASTER or parameter.requires_grad}
        for name, parameter in engine.module.named_parameters()
    }
    return ParameterState(tensors, scalars)


@torch.no_grad()
def write_parameter_state(engine: ExpertParallelEngine, state: ParameterState) -> None:
    """Set masters, parameters and optimizer state to ``state``, which has every parameter of this rank, whole.

    Collective over all ranks.
    """
    if state.scalars or any(key != MASTER for tensors in state.tensors.values() for key in tensors):
        _create_optimizer_states(engine, state.scalars)
    for name, parameter in engine.module.named_parameters():
        for key, value in state.tensors[name].items():
            write_state(engine, parameter, key, value)
    if engine.shards_parameters:
        gather_kept(engine)


def state_keys(engine: ExpertParallelEngine) -> list[str]:
    """Return MASTER and the optimizer's states with a shape; before the first step there are none of the latter."""
    states = _optimizer_states(engine)
    if states:
        _link_states(engine)
    return [MASTER, *(key for key, value in (states[0] if states else {}).items() if has_shape(value))]


def read_state(engine: ExpertParallelEngine, parameter: nn.Parameter, key: str) -> Tensor:
    """Return one of :func:`state_keys` of one parameter, whole. Collective over the ranks that share it."""
    deepspeeds_key = None if key == MASTER else key
    if not parameter.requires_grad:
        return _held_master(engine, parameter)
    if engine.shards_parameters:
        return engine.optimizer.get_full_hp_param(parameter, deepspeeds_key)
    if engine.zero_optimization():
        return parameter.get_full_hp_param(deepspeeds_key)  # type: ignore[attr-defined]
    return parameter.detach().float() if key == MASTER else engine.optimizer.state[parameter][key]


@torch.no_grad()
def write_state(engine: ExpertParallelEngine, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Set one of :func:`state_keys` of one parameter to ``value``, whole, on every rank that shares it.

    A parameter follows its master.
    """
    deepspeeds_key = None if key == MASTER else key
    if engine.shards_parameters:
        value = own_slice(parameter, value)
    if not parameter.requires_grad:
        if parameter.dtype != value.dtype:
            engine.held_masters[parameter] = value.clone()
    elif engine.shards_parameters:
        engine.optimizer.set_local_hp_param(value, parameter, deepspeeds_key)
    elif engine.zero_optimization():
        parameter.set_full_hp_param(value, deepspeeds_key)  # type: ignore[attr-defined]
    elif key != MASTER:
        engine.optimizer.state[parameter][key].copy_(value)
    if key == MASTER:
        (parameter.ds_tensor if engine.shards_parameters else parameter).copy_(value)  # type: ignore[attr-defined]


def _held_master(engine: ExpertParallelEngine, parameter: nn.Parameter) -> Tensor:
    """Return the master of a parameter that is held still, unknown to the optimizer and to DeepSpeed.

    Where parameters have less than fp32, it is what :func:`write_state` was given last, so that it does not lose bits.
    """
    if engine.shards_parameters:
        own = engine.held_masters.get(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
        return engine.optimizer._fp32_state_allgather(parameter, own)
    return engine.held_masters.get(parameter, parameter.detach()).float()


def _torch_optimizer(engine: ExpertParallelEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _optimizer_states(engine: ExpertParallelEngine) -> list[dict[str, Any]]:
    return [dict(state) for state in _torch_optimizer(engine).state.values()]


def _create_optimizer_states(engine: ExpertParallelEngine, scalars: dict[str, float]) -> None:
    """Give each tensor that the optimizer owns a state of its own (none shares its step with another).

    Numbers are as the optimizer itself would make them: torch's fused Adam counts steps on the device, others count
    on the CPU, DeepSpeed's Adam counts in Python.

    At stage 3 (0.19.8) DeepSpeed puts its sub-groups into the optimizer's parameter groups one by one, within a step
    only; between steps the groups there are not what has state.
    """
    optimizer = _torch_optimizer(engine)
    groups = optimizer.param_groups
    sharded = engine.shards_parameters
    all_owned = engine.optimizer.fp32_partitioned_groups_flat if sharded else [p for g in groups for p in g["params"]]
    like = engine.first_states(all_owned[0].device)
    for owned in all_owned:
        optimizer.state[owned] = {
            key: torch.zeros_like(owned) if has_shape(value) else number_like(value, scalars[key])
            for key, value in like.items()
        }
    _link_states(engine)


def number_like(value: Any, number: float) -> Any:
    """Return ``number`` as ``value`` is: a tensor of its dtype on its device, or a number of Python."""
    return torch.full_like(value, number) if isinstance(value, Tensor) else type(value)(number)


def _link_states(engine: ExpertParallelEngine) -> None:
    """Let DeepSpeed's per-parameter views of optimizer states see those of all parameter groups.

    ZeRO stages 1 and 2 (0.19.8) step one group after the other and link the views once, after the first group's first
    step: the other groups have no state yet then. Linking again, once all have, is what it would do by itself.
    """
    if engine.zero_optimization() and not engine.shards_parameters:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
