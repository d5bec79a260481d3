"""MoE: several gates over one bank of experts that is split over the ranks of a world."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_moe.experts import ExpertBank
from dist_moe.gates import Gate
from dist_moe.layer.ownership import Ownership, check_engine
from dist_moe.parallel import (
    Exchange,
    Placement,
    SingleWorld,
    World,
    combine,
    dispatch,
    exchange_over,
    expert_table,
    plan_dispatch,
    position_table,
    timed,
)
from dist_moe.parallel.exchange import LocalExperts
from dist_moe.routing import Pairs, Route, SlotMap, union_of_routes


class SlotMapSource(Protocol):
    """Gives the slot map of the current step of each of ``num_gates`` gates, and named auxiliary losses.

    The maps lead from ``num_slots`` slots, of each of ``branches`` branches, to ``num_experts`` experts.
    """

    num_gates: int
    num_experts: int

    @property
    def num_slots(self) -> int:
        """Number of slots of a gate, or of each of its branches."""
        ...

    @property
    def branches(self) -> int:
        """Number of maps of each gate: 1, or one for each of its branches."""
        ...

    def begin_step(self) -> None:
        """Prepare for a training step. On every rank: searches agree here."""

    def __call__(self) -> tuple[Sequence[SlotMap], dict[str, Tensor]]: ...


class Replay(Protocol):
    """Stands in for a layer's forward pass: a search reuses what the experts gave for the same tokens."""

    def __call__(self, layer: MoE, x_TD: Tensor, ids_T: Tensor | None) -> MoEOutput: ...


@dataclass(frozen=True)
class MoEOutput:
    """``outputs``: one (T, F) tensor per gate. ``aux``: the auxiliary losses, summed over gates.

    ``routes``: one per gate, after the slot map: their slots are experts. ``pairs``: their union, what was
    dispatched, in the order of the experts' positions. ``rows_computed``: expert rows that this rank computed, for
    itself and for others.
    """

    outputs: tuple[Tensor, ...]
    aux: dict[str, Tensor]
    routes: tuple[Route, ...]
    pairs: Pairs
    rows_computed: int


class MoE(nn.Module):
    """``MoE(gates, experts, slot_map=None, world=None, exchange=None, placement=None)``.

    ``gates``: one per task (a single gate may stand alone); a (token, expert) pair travels and is
    computed once, however many gates want it. ``experts``: this rank's bank. ``slot_map``: the slot map of each
    gate, which may be many to one; None is the identity, for gates with as many slots as there are experts.
    ``world``: the ranks over which the experts are split; None is one rank. ``exchange``: how rows reach the experts
    and sums come back; None is what the world asks for. ``placement``: which expert lives where; None: ranks have
    contiguous ids. ``recompute_experts``: keep none of the dispatched rows and of the experts' activations for the
    backward pass; dispatch and compute again there (an ``exchange`` that is given decides that itself). ``shared``: a
    network (T, D) -> (T, F) that every token goes through whatever the gates say (Dai et al., DeepSeekMoE, 2024);
    its result is added to that of each gate. Every rank has all of it, and computes it while rows travel.

    Raises ValueError when gates, bank and world do not fit each other. Where the experts are split over ranks, a pass
    raises RuntimeError if somebody has overwritten or sharded them (see ownership.py).
    """

    _is_fsdp_managed_module = False

    def __init__(
        self,
        gates: Gate | Sequence[Gate],
        experts: ExpertBank,
        slot_map: SlotMapSource | None = None,
        world: World | None = None,
        *,
        exchange: Exchange | None = None,
        placement: Placement | None = None,
        recompute_experts: bool = False,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList([gates] if isinstance(gates, Gate) else gates)
        self.experts = experts
        self.slot_map = slot_map
        self.world = world or SingleWorld()
        self.shared = shared
        self.exchange = exchange or exchange_over(
            self.world, recompute_experts, meanwhile=shared is not None, at_once=experts.batch_dependent
        )
        self.placement = placement or Placement.identity(experts.num_experts, self.world.size)
        self._replay: Replay | None = None
        self._before_step: list[tuple[Tensor, Tensor]] = []
        self._check_sizes()
        self._ownership = Ownership(self.world)
        self._ignored_by_ddp: set[str] = set()
        if self.world.size > 1:
            experts.mark(f"ep_size_{self.world.size}")

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> MoEOutput:
        """Return one weighted sum of experts per gate, (T, F), for (T, D) tokens; T may be 0."""
        if self._replay is not None:
            return _plus(self._replay(self, x_TD, ids_T), self._share(x_TD))
        clock = self.world.clock
        shared: list[Tensor | None] = []
        (x_TD,) = clock.mark("gate", None, x_TD)
        routes, aux = self._route(x_TD, ids_T)
        by_position = routes
        if not self.placement.is_identity:
            position_E = position_table(self.placement, x_TD.device)
            by_position = [replace(route, slot_N=position_E[route.slot_N]) for route in routes]
        pairs = union_of_routes(by_position)
        mixed = timed(self.exchange, clock)(
            x_TD, pairs, self._own_experts(), meanwhile=lambda: shared.append(self._share(x_TD))
        )
        outputs = mixed.sums_GTF.to(mixed.dtype).unbind()
        if not self.placement.is_identity:
            pairs = pairs.renamed(expert_table(self.placement, x_TD.device))
        result = MoEOutput(outputs, aux, tuple(routes), pairs, mixed.rows_computed)
        return _plus(result, shared[0])

    @contextmanager
    def replayed_by(self, replay: Replay) -> Iterator[None]:
        """Let ``replay`` answer instead of gates, slot maps and experts within the context."""
        self._replay = replay
        try:
            yield
        finally:
            self._replay = None

    def place(self, placement: Placement) -> None:
        """Let the experts live as ``placement`` says from now on. On every rank.

        Whoever calls has brought the weights there: row i of the bank's parameters must be those of the
        expert ``placement.experts_of(rank)[i]``. Raises ValueError if it does not fit the layer.
        """
        self._check_fit(placement)
        self.placement = placement
        self.experts.expert_ids = placement.experts_of(self.world.rank)
        if self.world.size > 1:
            self.experts.dealt_PE = self.experts.fingerprint()

    def by_expert(self, x_E: Tensor) -> Tensor:
        """Return (E, ...) in the order of the experts' ids, given it in the order of their positions."""
        return x_E if self.placement.is_identity else x_E[position_table(self.placement, x_E.device)]

    def all_results(self, x_TD: Tensor) -> Tensor:
        """Return the (T, E, F) results of every expert, wherever it lives, for each of this rank's tokens."""
        tokens, experts = len(x_TD), self.experts.num_experts
        rows_per_expert_E = torch.full((experts,), tokens, device=x_TD.device)
        plan = plan_dispatch(rows_per_expert_E, self.world, tokens * experts)
        rows = dispatch(x_TD.repeat(experts, 1), plan, self.world)
        results_NF = combine(self.experts(rows, plan.rows_per_local_expert), plan, self.world)
        return self.by_expert(results_NF.view(experts, tokens, self.experts.out_dim)).transpose(0, 1)

    def begin_step(self, step: int) -> None:
        """Tell the gates and the slot map that training step ``step`` (from 0) begins. On every rank."""
        for gate in self.each_gate:
            gate.begin_step(step)
        if self.slot_map is not None:
            self.slot_map.begin_step()
        modules: list[nn.Module] = [*self.each_gate, self.experts]
        self._before_step = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def end_step(self, *, skipped: bool = False) -> None:
        """Tell the gates that a training step has ended; let them and the experts forget one that was skipped."""
        if not skipped:
            for gate in self.each_gate:
                gate.end_step()
            return
        with torch.no_grad():
            for buffer, before in self._before_step:
                buffer.copy_(before)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False, **_: Any) -> None:
        """Refuse an engine of DeepSpeed that takes split experts for copies; every engine calls this when it is built.

        Raises RuntimeError except from ``dist_moe.integrations.deepspeed.initialize`` and :func:`dist_moe.fit`.
        """
        check_engine(self, self.world)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """Names of the split experts' tensors: DDP asks the module that it wraps for what it shall leave alone."""
        tensors = chain(self.experts.named_parameters(), self.experts.named_buffers())
        return self._ignored_by_ddp | {f"experts.{name}" for name, _ in tensors if self.world.size > 1}

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        self._ignored_by_ddp = set(names)

    def _own_experts(self) -> LocalExperts:
        """Return the experts for this pass; those of several ranks are looked at first where others may wrap them."""
        if self.world.size == 1:
            return self.experts
        own, in_training = self._ownership, self.training and torch.is_grad_enabled()
        bare = DistributedDataParallel._active_ddp_module is None and not self._is_fsdp_managed_module
        is_settled = bare and not own.averaged and in_training in own.looked_at
        return self.experts if is_settled else own.experts(self, self.experts)

    def _share(self, x_TD: Tensor) -> Tensor | None:
        return None if self.shared is None else self.shared(x_TD)

    def _route(self, x_TD: Tensor, ids_T: Tensor | None) -> tuple[list[Route], dict[str, Tensor]]:
        routes: list[Route] = [gate(x_TD, ids_T) for gate in self.gates]
        aux: dict[str, Tensor] = {}
        for route in routes:
            for name, loss in route.aux.items():
                aux[name] = aux[name] + loss if name in aux else loss
        if self.slot_map is not None:
            maps, map_aux = self.slot_map()
            routes = [slot_map.apply(route) for slot_map, route in zip(maps, routes, strict=True)]
            aux |= map_aux
        return routes, aux

    @property
    def each_gate(self) -> list[Gate]:
        """Return the ``gates``, typed."""
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def _check_fit(self, placement: Placement) -> None:
        if (placement.num_experts, placement.num_ranks) != (self.experts.num_experts, self.world.size):
            raise ValueError(
                f"a placement of {placement.num_experts} experts on {placement.num_ranks} rank(s) does not fit "
                f"{self.experts.num_experts} experts on {self.world.size}"
            )

    def _check_sizes(self) -> None:
        bank = self.experts
        if not self.gates:
            raise ValueError("an MoE layer needs at least one gate")
        table = self.slot_map
        if table is not None and (table.num_gates, table.num_experts) != (len(self.gates), bank.num_experts):
            raise ValueError(
                f"slot maps for {table.num_gates} gate(s) onto {table.num_experts} experts do not fit "
                f"{len(self.gates)} gate(s) and {bank.num_experts} experts"
            )
        slots, branches = (bank.num_experts, 1) if table is None else (table.num_slots, table.branches)
        for gate in self.each_gate:
            if (gate.dim, gate.num_experts, gate.num_slots) != (bank.dim, slots, slots * branches):
                asked = f"{slots} slots" if branches == 1 else f"{slots} slots in each of {branches} branches"
                raise ValueError(
                    f"a gate over {gate.num_slots} slots and tokens of width {gate.dim} does not fit "
                    f"{bank.num_experts} experts of width {bank.dim}, whose slot map is for {asked}"
                )
        self._check_fit(self.placement)
        expected = self.placement.experts_of(self.world.rank)
        if bank.expert_ids != expected:
            raise ValueError(
                f"rank {self.world.rank} of {self.world.size} must hold the experts {expected}, "
                f"its bank holds {bank.expert_ids}"
            )


def _plus(result: MoEOutput, shared_TF: Tensor | None) -> MoEOutput:
    if shared_TF is None:
        return result
    return replace(result, outputs=tuple(output_TF + shared_TF for output_TF in result.outputs))
