"""Who owns a rank's experts: a layer notices others that overwrite, average or shard what only this rank has.

Data-parallel wrappers take every parameter for a copy of rank 0's. DDP and ``deepspeed.initialize`` broadcast
parameters when they are built, FSDP mixes the ranks' slices: the experts of other ranks are gone, without a word. The
layer looks for that when it runs for the first time, when it first runs in training, and whenever it first runs
inside another DDP; in no other step.

By two signs. DDP and FSDP say themselves which parameters they manage. And whatever did it: a rank whose expert is
now, bit for bit, that which another rank was dealt and still has, while its own was dealt differently, has been
overwritten. Weights that a user sets alike on all ranks (zeros, one dense network for all experts, the same seed) are
no such case: there the other rank no longer has what it was dealt. What is loaded, cast or moved counts as dealt anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from dist_moe.experts import ExpertBank
from dist_moe.parallel import World
from dist_moe.parallel.exchange import LocalExperts
from dist_moe.parallel.wrappers import (
    averaged_experts,
    ddp_around,
    is_fully_sharded,
    is_fully_sharded_alone,
    ranks_of_job,
    shares_rows,
)

REMEDIES = {
    "DistributedDataParallel": "call dist_moe.integrations.data_parallel.wrap_ddp(model) in its place, or "
    "prepare_for_ddp(model) before it",
    "FSDP": "call dist_moe.integrations.data_parallel.fully_shard_dense in place of fully_shard",
    "deepspeed.initialize": "call dist_moe.integrations.deepspeed.initialize in its place",
}
"""For each wrapper, what to do in its place."""

_engine_knows_experts: ContextVar[bool] = ContextVar("engine_knows_experts", default=False)


@contextmanager
def engine_knows_experts() -> Iterator[None]:
    """Let an engine of DeepSpeed that handles our experts take layers inside the block."""
    before = _engine_knows_experts.set(True)
    try:
        yield
    finally:
        _engine_knows_experts.reset(before)


def check_engine(layer: nn.Module, world: World) -> None:
    """Raise RuntimeError unless the engine of DeepSpeed that takes ``layer`` knows that its experts are split."""
    if world.size > 1 and not _engine_knows_experts.get():
        raise RuntimeError(_foreign(layer, "deepspeed.initialize", "takes the experts for copies of one another"))


class Ownership:
    """``experts(layer, bank)`` -> what a layer of ``world``, of several ranks, gives to its exchange.

    That is ``bank``; inside DDP and FSDP, which average dense gradients over their ranks, the bank with gradients that
    are averages too. Raises RuntimeError, on all ranks alike, where the experts are not this rank's own any more.
    ``looked_at``: whether in training, of the passes outside any DDP that were looked at. ``averaged``: whether the
    last pass was inside such a wrapper.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.averaged = False
        self.looked_at: set[int] = set()

    def experts(self, layer: nn.Module, bank: ExpertBank) -> LocalExperts:
        """Return the experts for this forward pass; a repetition within a backward pass gets those of the first."""
        if torch._C._current_graph_task_id() == -1:
            ddp = ddp_around(self._world)
            if self._is_first_look(layer, ddp):
                self._check_wrappers(layer, bank, ddp)
                _compare(bank, self._world, layer)
            self.averaged = ddp is not None or is_fully_sharded(layer)
        return averaged_experts(bank, self._world.size) if self.averaged else bank

    def _is_first_look(self, layer: nn.Module, ddp: Any) -> bool:
        """Return whether to look now: decided by what is the same on all ranks, or they would wait for one another."""
        looked_at = self.looked_at if ddp is None else vars(ddp).setdefault("_looked_at_experts_of", set())
        key = layer.training and torch.is_grad_enabled() if ddp is None else id(layer)
        is_first = key not in looked_at
        looked_at.add(key)
        return is_first

    def _check_wrappers(self, layer: nn.Module, bank: ExpertBank, ddp: Any) -> None:
        if ddp is not None:
            prefix = next((name for name, module in ddp.module.named_modules() if module is bank), None)
            names = {f"{prefix}.{name}".lstrip(".") for name, _ in bank.named_parameters()}
            if prefix is None or not names <= set(ddp.parameters_to_ignore):
                did = "broadcast one rank's experts over the others' and averages their gradients"
                raise RuntimeError(_foreign(layer, "DistributedDataParallel", did, prefix))
            if ddp.process_group.size() > self._world.size and not getattr(ddp, "averages_copies_of_experts", False):
                did = f"has {ddp.process_group.size()} ranks, and no one averages over those that hold copies"
                raise RuntimeError(_foreign(layer, "DistributedDataParallel", did, prefix))
        if is_fully_sharded(layer) and self._is_sharded(bank):
            raise RuntimeError(_foreign(layer, "FSDP", "shards the experts as if they were copies of one another"))
        if is_fully_sharded(layer) and ranks_of_job() > self._world.size and not is_fully_sharded_alone(bank):
            warnings.warn(
                f"{_named(layer, None)}: FSDP leaves its experts alone, which is right, but if other ranks hold copies "
                f"of them, no one averages over those; {REMEDIES['FSDP']}",
                stacklevel=2,
            )

    def _is_sharded(self, bank: ExpertBank) -> bool:
        """Return whether FSDP has spread the experts over other ranks of the world.

        During the pass ``fully_shard`` has parameters of its own in the place of those that it manages, the older class
        plain tensors, or none.
        """
        parameters = list(bank.parameters())
        foreign = [p for p in parameters if not hasattr(p, "group_name")]
        taken = any(type(p) in (nn.Parameter, torch.Tensor) for p in foreign) or len(parameters) < bank.num_marked
        return (taken and not is_fully_sharded_alone(bank)) or any(shares_rows(p, self._world) for p in foreign)


def _compare(bank: ExpertBank, world: World, layer: nn.Module) -> None:
    """Compare the ranks' experts now, or where they are in slices, as soon as ``bank`` runs: they are whole then."""
    if bank.fingerprint() is not None:
        compare_with_dealt(bank, world, layer)
        return

    def compare(*_: Any) -> None:
        handle.remove()
        compare_with_dealt(bank, world, layer)

    handle = bank.register_forward_hook(compare, prepend=True)  # before the hooks of ZeRO stage 3 and FSDP


@torch.no_grad()
def compare_with_dealt(bank: ExpertBank, world: World, layer: nn.Module) -> None:
    """Raise RuntimeError, on all ranks, if a rank has what another was dealt and still has. Collective: one gather."""
    now_PE = bank.fingerprint()
    if now_PE is None:
        return
    dealt_PE = torch.full_like(now_PE, -1) if bank.dealt_PE is None else bank.dealt_PE.to(now_PE.device)
    dealt_RPE, now_RPE = torch.stack(world.gather(torch.stack([dealt_PE, now_PE]))).unbind(1)
    keeps_RPE = (dealt_RPE == now_RPE) & (dealt_RPE != -1)
    for source in range(world.size):
        taken_RPE = keeps_RPE[source] & (now_RPE == now_RPE[source]) & (dealt_RPE != dealt_RPE[source])
        victims = taken_RPE.flatten(1).any(dim=1).nonzero().flatten().tolist()
        if victims:
            raise RuntimeError(
                f"{_named(layer, None)}: rank(s) {victims} of its world hold experts of rank {source} in place of the "
                f"different ones that they were dealt: DistributedDataParallel, deepspeed.initialize or a broadcast "
                f"of your own has overwritten them. For DDP, {REMEDIES['DistributedDataParallel']}; for FSDP, "
                f"{REMEDIES['FSDP']}; for DeepSpeed, {REMEDIES['deepspeed.initialize']}; in a broadcast of your own, "
                f"leave out parameters whose attribute allreduce is False"
            )
    bank.dealt_PE = now_PE


def _foreign(layer: nn.Module, wrapper: str, does: str, prefix: str | None = None) -> str:
    return f"{_named(layer, prefix)}: its experts are split over ranks, but {wrapper} {does}; {REMEDIES[wrapper]}"


def _named(layer: nn.Module, prefix: str | None) -> str:
    name = (prefix or "").rpartition(".")[0]
    bank: Any = layer.experts
    return f"{type(layer).__name__} {name!r}" if name else f"{type(layer).__name__} of {bank.num_experts} experts"
