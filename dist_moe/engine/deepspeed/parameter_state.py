"""Masters and optimizer state by parameter, whole and in fp32, whatever the ZeRO stage.

This is what makes a checkpoint portable: from stage 1 on DeepSpeed keeps masters and moments, and at
stage 3 the parameters too, as slices of flat buffers spread over ranks; here they are read and written
parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.deepspeed.optimizers import first_states_of, has_shape
from dist_moe.engine.deepspeed.sharded_parameters import gather_kept, own_slice, whole_shape

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine

MASTER = "master"
BUCKET = 2**24
"""Numbers that ranks put together at once, in fp32: 64 MiB of the device's memory."""


@dataclass(frozen=True)
class Piece:
    """A run of numbers of one state of one parameter, on the way to host memory.

    ``start``: the place of the first in the flattened parameter. ``count``: how many. ``host``: where they are wanted,
    flat and fp32 in host memory; None on a rank that does not want them.
    """

    parameter: nn.Parameter
    key: str
    start: int
    count: int
    host: Tensor | None


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
    """Return the state of all dense parameters and of this rank's experts, whole on its device: for small models.

    Collective over all ranks.
    """
    keys = state_keys(engine)
    tensors = {
        name: {key: read_state(engine, parameter, key) for key in keys if key == MASTER or parameter.requires_grad}
        for name, parameter in engine.module.named_parameters()
    }
    return ParameterState(tensors, state_scalars(engine))


@torch.no_grad()
def write_parameter_state(
    engine: ExpertParallelEngine,
    keys: Sequence[str],
    scalars: dict[str, float],
    states_of: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Set masters, parameters and optimizer state, one parameter at a time.

    ``keys``, ``scalars``: optimizer states with a shape, and without. ``states_of``: from the name of a parameter to
    its states, whole, in host memory or on the device. Collective over all ranks.
    """
    if keys or scalars:
        _create_optimizer_states(engine, scalars)
    for name, parameter in engine.module.named_parameters():
        for key, value in states_of(name).items():
            write_state(engine, parameter, key, value)
    if engine.shards_parameters:
        gather_kept(engine)


def state_scalars(engine: ExpertParallelEngine) -> dict[str, float]:
    """Return the optimizer's states without a shape, which are the same for all parameters; none before a step."""
    states = _optimizer_states(engine)
    return {key: float(value) for key, value in states[0].items() if not has_shape(value)} if states else {}


def state_keys(engine: ExpertParallelEngine) -> list[str]:
    """Return MASTER and the optimizer's states with a shape; before the first step there are none of the latter."""
    states = _optimizer_states(engine)
    if states:
        _link_states(engine)
    return [MASTER, *(key for key, value in (states[0] if states else {}).items() if has_shape(value))]


def read_state(engine: ExpertParallelEngine, parameter: nn.Parameter, key: str) -> Tensor:
    """Return one of :func:`state_keys` of one parameter, whole, fp32. Collective over the ranks that share it."""
    shape = whole_shape(parameter)
    if _group_of(engine, parameter) is None:
        return _own_part(engine, parameter, key)[0].view(shape).float()
    piece = Piece(parameter, key, 0, shape.numel(), None)
    return _gathered(engine, [piece], torch.empty(shape.numel(), device=engine.device)).view(shape)


@torch.no_grad()
def copy_to_host(engine: ExpertParallelEngine, pieces: Iterable[Piece]) -> None:
    """Fill the host memory of ``pieces``, which are the same on all ranks but for where they are wanted.

    Through one buffer of BUCKET numbers on the device, in which the ranks that share a parameter put together what
    each has of it, whatever the sizes of parameters: that is all the memory that it takes there, and no parameter
    costs a collective of its own. Collective over all ranks.
    """
    on_gpu = engine.device.type == "cuda"
    device = torch.empty(BUCKET, device=engine.device)
    host = (
        torch.empty(BUCKET, pin_memory=True) if on_gpu else device
    )  # a GPU copies to pinned memory alone at full rate
    for bucket in _buckets(engine, pieces):
        wanted = any(piece.host is not None for piece in bucket)
        if not wanted and _group_of(engine, bucket[0].parameter) is None:
            continue
        numbers = _gathered(engine, bucket, device)
        if not wanted:
            continue
        if on_gpu:
            host[: len(numbers)].copy_(numbers)
        place = 0
        for piece in bucket:
            if piece.host is not None:
                piece.host.copy_(host[place : place + piece.count])
            place += piece.count


def _buckets(engine: ExpertParallelEngine, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield ``pieces``, cut where need be, in lists of at most BUCKET numbers of parameters that one group shares."""
    for _, shared in groupby(pieces, lambda piece: _group_of(engine, piece.parameter)):
        bucket, free = list[Piece](), BUCKET
        for piece in shared:
            done = 0
            while done < piece.count:
                count = min(free, piece.count - done)
                host = None if piece.host is None else piece.host[done : done + count]
                bucket.append(replace(piece, start=piece.start + done, count=count, host=host))
                done, free = done + count, free - count
                if not free:
                    yield bucket
                    bucket, free = [], BUCKET
        if bucket:
            yield bucket


def _gathered(engine: ExpertParallelEngine, bucket: list[Piece], buffer: Tensor) -> Tensor:
    """Return the numbers of ``bucket``, in ``buffer``. Collective over the ranks that share its parameters, if any.

    Every number is a sum of which all ranks but one bring zero bits, as integers: no bit of it changes, not of -0.0
    and not of a NaN.
    """
    numbers = buffer[: sum(piece.count for piece in bucket)].zero_()
    place = 0
    for piece in bucket:
        own, start = _own_part(engine, piece.parameter, piece.key)
        begin, end = max(piece.start, start), min(piece.start + piece.count, start + own.numel())
        if begin < end:
            first = place + begin - piece.start
            numbers[first : first + end - begin].copy_(own[begin - start : end - start])
        place += piece.count
    group = _group_of(engine, bucket[0].parameter)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(numbers.view(torch.int32), group=group)
    return numbers


def _group_of(engine: ExpertParallelEngine, parameter: nn.Parameter) -> Any:
    """Return the group over whose ranks the states of a parameter are spread in parts; None if each has them whole.

    Those of a parameter that is held still are in parts at stage 3 only.
    """
    spread = engine.shards_parameters or (engine.zero_optimization() and parameter.requires_grad)
    return engine.group_of(parameter) if spread else None


def _own_part(engine: ExpertParallelEngine, parameter: nn.Parameter, key: str) -> tuple[Tensor, int]:
    """Return what this rank holds of a state, flat, and its place in the flattened parameter; no copy is made.

    The master of a parameter that is held still, of which neither optimizer nor DeepSpeed knows, is what
    :func:`write_state` was given last where parameters have less than fp32, so that it does not lose bits.
    """
    deepspeeds_key = None if key == MASTER else key
    if engine.shards_parameters:
        start = parameter.ds_tensor.ds_numel * dist.get_rank(engine.group_of(parameter))  # type: ignore[attr-defined]
        if parameter.requires_grad:
            own = engine.optimizer._get_fp32_opt_state_partition(parameter, True, deepspeeds_key)[0]
        else:
            own = engine.held_masters.get(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
        return own.detach().flatten(), start
    if not parameter.requires_grad:
        return engine.held_masters.get(parameter, parameter.detach()).flatten(), 0
    if engine.zero_optimization():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0), 0
        return mapping.get_hp_fragment(deepspeeds_key).detach().flatten(), mapping.lp_fragment_address.start
    return (parameter.detach() if key == MASTER else engine.optimizer.state[parameter][key]).flatten(), 0


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
            engine.held_masters[parameter] = value.to(engine.device, copy=True)
    elif engine.shards_parameters:
        engine.optimizer.set_local_hp_param(value, parameter, deepspeeds_key)
    elif engine.zero_optimization():
        parameter.set_full_hp_param(value, deepspeeds_key)  # type: ignore[attr-defined]
    elif key != MASTER:
        engine.optimizer.state[parameter][key].copy_(value)
    if key == MASTER:
        (parameter.ds_tensor if engine.shards_parameters else parameter).copy_(value)  # type: ignore[attr-defined]


@torch.no_grad()
def zero_state(engine: ExpertParallelEngine, parameter: nn.Parameter, mask: Tensor) -> None:
    """Set a trained parameter to zero where ``mask``, of its whole shape, is True; its master and moments, too.

    Nothing is sent: each rank zeroes what it holds. At stage 3 :func:`gather_kept` must follow.
    """
    flat = own_slice(parameter, mask.byte()).bool() if engine.shards_parameters else mask.flatten()
    for key in state_keys(engine):
        own, start = _own_part(engine, parameter, key)
        part = flat if engine.shards_parameters else flat[start : start + own.numel()]
        own.masked_fill_(part[: own.numel()].to(own.device), 0)
    parameter_of_model = parameter.ds_tensor if engine.shards_parameters else parameter.data.view(-1)  # type: ignore[attr-defined]
    parameter_of_model.masked_fill_(flat.to(parameter_of_model.device), 0)


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
    like = first_states_of(optimizer, all_owned[0].device)
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
