"""Masters and optimizer state by parameter, whole and in fp32, whatever the ZeRO stage.

This is what makes a checkpoint portable: at stages 1 and 2 DeepSpeed keeps masters and moments as
slices of flat buffers spread over ranks; here they are read and written parameter by parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_moe.engine.expert_parallel_engine import ExpertParallelEngine


MASTER = "master"


@dataclass(frozen=True)
class ParameterState:
    """``tensors[name]``: the fp32 master under MASTER, then each optimizer state of its shape (for
    Adam ``exp_avg``, ``exp_avg_sq``). ``scalars``: states without a shape (Adam's ``step``), which
    are the same for all parameters."""

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, float]


def read_parameter_state(engine: ExpertParallelEngine) -> ParameterState:
    """Collective over all ranks. Every rank gets all dense parameters and its own experts."""
    read = _read_partitioned if engine.zero_optimization() else _read_whole
    states = _optimizer_states(engine)
    if states:
        _link_states(engine)
    keys = [key for key, value in states[0].items() if _has_shape(value)] if states else []
    scalars = {k: float(v) for k, v in states[0].items() if not _has_shape(v)} if states else {}
    tensors = {name: read(engine, parameter, keys) for name, parameter in engine.module.named_parameters()}
    return ParameterState(tensors, scalars)


@torch.no_grad()
def write_parameter_state(engine: ExpertParallelEngine, state: ParameterState) -> None:
    """The inverse; ``state`` must hold every parameter of this rank, in its shape."""
    keys = sorted({key for tensors in state.tensors.values() for key in tensors if key != MASTER})
    if keys or state.scalars:
        _create_optimizer_states(engine, keys, state.scalars)
    write = _write_partitioned if engine.zero_optimization() else _write_whole
    for name, parameter in engine.module.named_parameters():
        write(engine, parameter, state.tensors[name])


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _torch_optimizer(engine: ExpertParallelEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _optimizer_states(engine: ExpertParallelEngine) -> list[dict[str, Any]]:
    return [dict(state) for state in _torch_optimizer(engine).state.values()]


def _create_optimizer_states(engine: ExpertParallelEngine, keys: list[str], scalars: dict[str, float]) -> None:
    """Give each tensor that the optimizer owns a state of its own (none shares its step with another)."""
    optimizer = _torch_optimizer(engine)
    for group in optimizer.param_groups:
        for owned in group["params"]:
            optimizer.state[owned] = {key: torch.zeros_like(owned) for key in keys} | {
                key: torch.tensor(value) for key, value in scalars.items()
            }
    _link_states(engine)


def _link_states(engine: ExpertParallelEngine) -> None:
    """Tell DeepSpeed's per-parameter views of the states of all parameter groups.

    DeepSpeed does this once, in its first step, when only the first group has any state.
    """
    if engine.zero_optimization():
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _read_whole(engine: ExpertParallelEngine, parameter: nn.Parameter, keys: list[str]) -> dict[str, Tensor]:
    state = engine.optimizer.state[parameter]
    return {MASTER: parameter.detach().float()} | {key: state[key] for key in keys}


def _write_whole(engine: ExpertParallelEngine, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        target = parameter if key == MASTER else engine.optimizer.state[parameter][key]
        target.copy_(tensor)


def _read_partitioned(engine: ExpertParallelEngine, parameter: nn.Parameter, keys: list[str]) -> dict[str, Tensor]:
    whole = {MASTER: parameter.get_full_hp_param()}  # type: ignore[attr-defined]
    return whole | {key: parameter.get_full_hp_param(key) for key in keys}  # type: ignore[attr-defined]


def _write_partitioned(engine: ExpertParallelEngine, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    parameter.copy_(tensors[MASTER])
    for key, tensor in tensors.items():
        parameter.set_full_hp_param(tensor, None if key == MASTER else key)  # type: ignore[attr-defined]
