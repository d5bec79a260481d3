"""torch's DDP and FSDP2 around models with split experts, and the norm of all their gradients.

Both average the gradients of dense parameters over their ranks. Inside them a layer averages those of its experts, too;
what is left to do is here: the wrapper has to leave experts alone, copies of the same experts on other ranks have to be
averaged, and a norm has to count each expert once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_moe.integrations.banks import split_banks, split_parameters
from dist_moe.parallel import World
from dist_moe.parallel.wrappers import replica_group


def prepare_for_ddp(model: nn.Module) -> nn.Module:
    """Return ``model``, of which DDP will leave the split experts alone, whoever wraps it: Lightning, Accelerate, you.

    What it shall leave alone already, it still does. Where ranks hold copies of the same experts (a DDP of more ranks
    than an expert-parallel world has), use :func:`wrap_ddp`: somebody has to average over the copies.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    ignored |= {name for split in split_banks(model) for name in split.tensor_names()}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


def wrap_ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Return ``model`` in DistributedDataParallel, right for split experts; ``options``: those of DDP.

    Dense gradients are averaged by DDP; those of experts, sums over the losses of the ranks of their world, are divided
    by their number, and averaged over the ranks that hold copies of the same experts, at the end of the backward
    pass. Under ``no_sync`` no one averages over ranks. Collective.
    """
    ddp = DistributedDataParallel(prepare_for_ddp(model), **options)
    groups: dict[World, dist.ProcessGroup | None] = {}
    for split in split_banks(model):
        if split.world not in groups:
            groups[split.world] = replica_group(split.world, ddp.process_group)
        if (group := groups[split.world]) is not None:
            average_copies(list(split.bank.parameters()), group, lambda: bool(ddp.require_backward_grad_sync))
    vars(ddp)["averages_copies_of_experts"] = True
    # The last attribute goes last. If the reducer dropped the last reference to the group, it would wait for gloo's
    # thread while it holds Python's lock; and that may wait for the lock, to let go of the last collective's tensors.
    vars(ddp)["outlives_the_reducer"] = ddp.process_group
    return ddp


def average_copies(
    parameters: list[nn.Parameter], group: dist.ProcessGroup, when: Callable[[], bool] = lambda: True
) -> None:
    """Average the gradients of ``parameters`` over ``group`` at the end of every backward pass from now on.

    ``when``: asked in every backward pass whether to. All of ``parameters`` at once, in their order, once their
    gradients have come, so that all ranks issue the same collectives.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    waiting = [False]

    def average() -> None:
        waiting[0] = False
        for parameter in trained:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= dist.get_world_size(group)

    def at_the_end(_: Tensor) -> None:
        if not waiting[0] and when():
            waiting[0] = True
            torch.autograd.Variable._execution_engine.queue_callback(average)

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(at_the_end)


def fully_shard_dense(
    module: nn.Module, *, mesh: DeviceMesh | None = None, ignored_params: Iterable[nn.Parameter] = (), **options: Any
) -> nn.Module:
    """Return ``module`` after ``fully_shard`` (FSDP2) has spread its dense parameters over ``mesh``; experts stay.

    To be called as ``fully_shard`` is: for blocks first, then for the whole. ``ignored_params``: others to leave alone;
    ``options``: those of ``fully_shard``. Gradients of experts become averages over the ranks of their world. Where
    other ranks of ``mesh`` (None: of all ranks) hold copies of the same experts, a bank is spread over those, by a
    ``fully_shard`` of its own. Collective.
    """
    kind = mesh.device_type if mesh is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    covered = _ranks_of(mesh)
    groups: dict[World, dist.ProcessGroup | None] = {}
    for split in split_banks(module):
        if any(isinstance(parameter, DTensor) for parameter in split.bank.parameters()):
            continue  # a block's, whose turn has been
        if split.world not in groups:
            groups[split.world] = replica_group(split.world, covered)
        if (group := groups[split.world]) is not None:
            copies = DeviceMesh.from_group(group, kind)
            fully_shard(split.bank, mesh=copies, **options)
    left_alone = {*ignored_params, *split_parameters(module)}
    fully_shard(module, mesh=mesh, ignored_params=left_alone, **options)
    return module


def _ranks_of(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """Return the process group of all ranks of ``mesh``; None for all ranks of the job."""
    if mesh is None or mesh.size() == dist.get_world_size():
        return None
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()


@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of ``model`` over the ranks of ``group`` (None: all), in a loop without any wrapper.

    After the last backward pass of a step, in place of an all-reduce of every ``grad``: dense gradients are summed over
    the ranks and divided by their number, those of experts, sums over their world already, are summed over the ranks
    that hold copies of them and divided alike. A dense parameter without a gradient on one rank counts as zero there.
    Collective.
    """
    owners, ranks = split_parameters(model), dist.get_world_size(group)
    copies = {world: replica_group(world, group) for world in dict.fromkeys(owners.values())}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter not in owners:
            dist.all_reduce(parameter.grad, group=group)
        elif (of_copies := copies[owners[parameter]]) is not None:
            dist.all_reduce(parameter.grad, group=of_copies)
        parameter.grad /= ranks


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients of ``model`` to a norm of at most ``max_norm``; return the norm that they had.

    The 2-norm of dense gradients, each counted once, and of the experts of all ranks: the same on every rank, where
    ``torch.nn.utils.clip_grad_norm_`` would give every rank another one, and dense parameters would drift apart.
    For DDP, FSDP2 and no wrapper at all, once gradients are reduced. Collective; DeepSpeed clips by itself.
    """
    owners = split_parameters(model)
    graded = [parameter for parameter in model.parameters() if parameter.grad is not None]
    square = _square([parameter for parameter in graded if parameter not in owners], model)
    for world in dict.fromkeys(owners.values()):
        square = square + world.sum(_square([p for p in graded if owners.get(p) is world], model))
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in graded:
        _local(parameter.grad).mul_(scale)
    return norm


def _square(parameters: list[nn.Parameter], model: nn.Module) -> Tensor:
    """Return the sum of the squares of all gradients, in fp32 at least; of slices, over the ranks that have them."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    sliced: dict[DeviceMesh, list[Tensor]] = {}
    for parameter in parameters:
        if isinstance(grad := parameter.grad, DTensor):
            sliced.setdefault(grad.device_mesh, []).append(grad)
        elif grad is not None:
            total = total + grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()
    for grads in sliced.values():
        norm = nn.utils.get_total_norm(grads)
        total = total + (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    return total


def _local(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad
