"""ZeRO stage 3: parameters of which every rank holds a slice, and what our modules need there.

DeepSpeed gathers the parameters of a module before its forward pass and before its backward pass, and
drops them after. It learns that a backward pass reaches a module from the module's outputs, but looks
for tensors only in tuples, lists and dicts, whereas gates and permutations give dataclasses; and it
knows nothing of what is read between two steps. Both are put right here, for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.search import SlotTable

_REPEATED = -1
"""Stands among the modules that use a parameter, which DeepSpeed numbers from 0, while a forward pass is repeated."""


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether ``parameter`` is one of ZeRO stage 3, whose own data are empty most of the time."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of ``parameter`` as the model declared it, sharded or not."""
    return torch.Size(parameter.ds_shape) if is_sharded(parameter) else parameter.shape  # type: ignore[attr-defined]


def own_slice(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return the part of ``value``, which has the whole shape, that this rank holds: flat, padded with zeros."""
    group, size = parameter.ds_process_group, parameter.partition_numel()  # type: ignore[attr-defined]
    flat = value.flatten()
    padded = nn.functional.pad(flat, (0, size * dist.get_world_size(group) - flat.numel()))
    return padded.narrow(0, size * dist.get_rank(group), size)


def gather_for_backward(model: nn.Module) -> list[RemovableHandle]:
    """Let DeepSpeed gather the parameters of our modules for the backward pass. Call it once DeepSpeed has its hooks.

    Two things are added to its hooks. It sees the tensors inside the dataclasses that modules give: its own search,
    ``apply_to_tensors_only``, leaves other objects out. And the parameters of a module whose forward pass is repeated
    within the backward pass (activation checkpointing) are kept: DeepSpeed would drop them after the repetition, when
    their gradients are still to come. It frees a parameter when no module is left in its ``ds_active_sub_modules``,
    and its hook after the repeated forward pass discards the module although its backward pass has begun.
    Returns the handles of the hooks.
    """
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(_hold))
        handles.append(module.register_forward_hook(_let_go))
        handles.append(module.register_forward_hook(_announce_backward))
    return handles


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1


def _hold(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Let nobody free the parameters during a repetition: DeepSpeed knows no module of this number."""
    if _in_backward_pass():
        for parameter in module.parameters(recurse=False):
            parameter.ds_active_sub_modules.add(_REPEATED)  # type: ignore[attr-defined]


def _let_go(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Mark parameters as in use by the backward pass of ``module`` again, as before the repetition.

    Registered after DeepSpeed's hooks, hence it runs when theirs has discarded the module.
    """
    if _in_backward_pass():
        for parameter in module.parameters(recurse=False):
            parameter.ds_active_sub_modules.add(module.ds_id)  # type: ignore[attr-defined]
            parameter.ds_active_sub_modules.discard(_REPEATED)  # type: ignore[attr-defined]


def _announce_backward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    # An identity whose backward pass, which comes before that of the module, gathers the module's parameters.
    return _inside_dataclasses(module.pre_bwd_fn.apply, output)  # type: ignore[union-attr, arg-type]


def _inside_dataclasses(function: Callable[[Tensor], Tensor], value: Any, inside: bool = False) -> Any:
    """Return ``value`` with ``function`` applied to every differentiable tensor that some dataclass in it holds.

    Those outside of dataclasses DeepSpeed has found itself.
    """
    if isinstance(value, Tensor):
        return function(value) if inside and value.requires_grad else value
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _inside_dataclasses(function, getattr(value, f.name), True) for f in fields(value)}
        return replace(value, **changed)
    if isinstance(value, dict):
        return {key: _inside_dataclasses(function, one, inside) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_inside_dataclasses(function, one, inside) for one in value)
    return value


def keep_tables_whole(engine: Any) -> None:
    """Never drop the parameters of slot -> expert tables: their searches read them between two steps.

    DeepSpeed keeps parameters below a size whole (``ds_persist``) and gathers them anew after every step, from its
    list ``persistent_parameters``; a table's parameters join them, whatever their size.
    """
    kept = [
        parameter
        for module in engine.module.modules()
        if isinstance(module, SlotTable)
        for parameter in module.parameters()
    ]
    for parameter in kept:
        if not parameter.ds_persist:  # type: ignore[attr-defined]
            parameter.ds_persist = True  # type: ignore[attr-defined]
            engine.optimizer.persistent_parameters.append(parameter)
    gather_kept(engine)


def gather_kept(engine: Any) -> None:
    """Bring the parameters that are kept whole up to date with their slices. Collective over all ranks."""
    kept = engine.optimizer.persistent_parameters
    # all_gather leaves alone what counts as gathered already: everything is dropped first.
    if kept:
        engine.optimizer._partition_all_parameters()
        kept[0].all_gather(kept)


def check_groups(parameters: Iterable[nn.Parameter], expected: Callable[[nn.Parameter], Any]) -> None:
    """Assert that every parameter is sharded over the ranks of its ``expected`` group, and no others."""
    for parameter in parameters:
        ours, theirs = (
            dist.get_process_group_ranks(group)
            for group in (expected(parameter), parameter.ds_process_group)  # type: ignore[attr-defined]
        )
        assert ours == theirs, f"a parameter is sharded over ranks {theirs} instead of {ours}"


def restore_parameters(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Give ``model`` plain parameters with the values ``whole`` by name, once its engine is gone.

    DeepSpeed leaves attributes on parameters, and at stage 3 other dictionaries in modules, for which a second engine
    would take the model for one that it has sharded already. Tied parameters stay tied.
    """
    fresh = {
        id(parameter): nn.Parameter(whole[name], requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    for module in model.modules():
        module._parameters = {name: p if p is None else fresh[id(p)] for name, p in module._parameters.items()}


def forget_module(model: nn.Module) -> None:
    """Take ``model`` out of a stack and a cache in DeepSpeed, in which it would live as long as the process.

    And with it its engine and the threads of the process groups. ``FWD_MODULE_STACK`` is a global list, to which
    every engine of stage 3 appends its module for good (0.19.8).
    """
    zero = import_deepspeed().runtime.zero
    stack = zero.parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    # A method behind functools.cache, from the second step on; engines that still live fill it again.
    coordinator = zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
