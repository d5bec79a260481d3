"""Placement while training: measure the load, let rank 0 decide, move the experts."""

from __future__ import annotations

import json
import math
import socket
from collections import deque
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.collectives import gather_objects
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.migration import migrate, state_bytes_per_expert
from dist_moe.engine.loop import StepRecord
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import Placement, sum_over_ranks
from dist_moe.recipes.supervised.plan import TrainingPlan
from dist_moe.recipes.supervised.report import Reporter
from dist_moe.routing import Pairs
from dist_moe.search import agree_on_placement
from dist_moe.search.placement_policy import MoveCosts, PlacementLook, propose

_PASSES = 2
"""Forward and backward: in each, a row travels once with the width of the input and once with that of the result."""


class ExpertMover:
    """Does what the section ``placement`` asks for, layer by layer; nothing where there is none, or one rank per group.

    The load is that of the recorded steps; a resumed run finds those before it in metrics.jsonl and so
    decides as the run would have that was not interrupted. Co-activations are counted in the step before
    each look, where a group has several nodes. ``first_step``: steps done before. Collective over all ranks.
    """

    def __init__(self, plan: TrainingPlan, engine: ExpertParallelEngine, reporter: Reporter, first_step: int) -> None:
        self._engine = engine
        self._reporter = reporter
        self._layers: dict[str, MoE] = engine.module.moe_layers
        self._total_steps = plan.schedule.total_steps
        size = plan.config.parallel.expert_parallel_size
        self._config = plan.config.placement if size > 1 else None
        self._together: dict[str, _CoActivations] = {}
        self._is_first = plan.environment.is_first
        self._loads: deque[list[list[float]]] = deque()
        if self._config is None:
            return
        self._ranks_per_node = self._config.ranks_per_node or _ranks_per_machine(size)
        if self._ranks_per_node < size:
            self._together = {name: _CoActivations(layer) for name, layer in self._layers.items()}
        self._loads = deque(maxlen=self._config.window)
        if self._is_first and first_step and plan.run.metrics.exists():  # a full disk may have kept it from being made
            with plan.run.metrics.open() as metrics:
                self._remember([record for record in map(json.loads, metrics) if "validation" not in record])

    def report(self, records: list[StepRecord]) -> None:
        """Take the load from the records of finished steps, and report them."""
        self._remember(records)
        self._reporter.steps(records)

    def before_step(self, step: int) -> None:
        """Before a training step, with the number of steps done."""
        if self._config is not None and self._config.due(step + 1):
            for counter in self._together.values():
                counter.begin()

    def after_step(self, step: int) -> None:
        """After a training step, with the number of steps done: look at the load and move if that is due and pays."""
        if self._config is None or not self._config.due(step) or step == self._total_steps:
            return
        for number, name in enumerate(self._layers):
            self._place(number, name, step)

    def _place(self, number: int, name: str, step: int) -> None:
        """Look at the load of one layer, and move its experts if that pays."""
        layer = self._layers[name]
        together_EE = self._together[name].end() if name in self._together else None
        wanted, look = self._look(number, layer, step, together_EE) if self._is_first else (layer.placement, None)
        moved = migrate(self._engine, layer, agree_on_placement(wanted))
        if look is not None:
            look = replace(look, moved=len(moved.experts), bytes=moved.bytes)
            self._reporter.placement(look, step, name if len(self._layers) > 1 else None)

    def _remember(self, records: list[dict[str, Any]]) -> None:
        if self._config is not None:
            self._loads.extend(record["load"] for record in records)

    def _look(
        self, number: int, layer: MoE, step: int, together_EE: Tensor | None
    ) -> tuple[Placement, PlacementLook | None]:
        if not self._loads:
            return layer.placement, None
        assert self._config is not None
        return propose(
            self._config,
            [load_LE[number] for load_LE in self._loads],
            layer.placement,
            None if together_EE is None else together_EE.cpu().numpy(),
            self._ranks_per_node,
            self._costs(layer, step),
        )

    def _costs(self, layer: MoE, step: int) -> MoveCosts:
        bank = layer.experts
        width = _PASSES * (bank.dim + bank.out_dim)
        return MoveCosts(
            row_bytes=width * next(bank.parameters()).element_size(),
            expert_bytes=state_bytes_per_expert(self._engine, layer),
            groups=self._engine.process_groups.environment.world_size // layer.world.size,
            steps_left=self._total_steps - step,
        )


class _CoActivations:
    """Counts, on demand, the tokens of training steps that want two experts."""

    def __init__(self, layer: MoE) -> None:
        experts = layer.experts
        device = next(experts.parameters()).device
        self._count_EE = torch.zeros((experts.num_experts,) * 2, dtype=torch.float64, device=device)
        self._counting = False
        layer.register_forward_hook(self._count)

    def begin(self) -> None:
        self._count_EE.zero_()
        self._counting = True

    def end(self) -> Tensor:
        """(E, E) counts over all ranks, on every rank. Collective over all ranks."""
        self._counting = False
        return sum_over_ranks(self._count_EE)

    def _count(self, layer: nn.Module, _: Any, output: MoEOutput) -> None:
        if self._counting and layer.training:
            self._count_EE += co_activations(output.pairs)


def co_activations(pairs: Pairs) -> Tensor:
    """(E, E) fp64: how many tokens want both experts; on the diagonal, how many want the one."""
    wanted_TE = torch.zeros(
        pairs.num_tokens, len(pairs.rows_per_expert_E), dtype=torch.float64, device=pairs.token_N.device
    )
    wanted_TE[pairs.token_N, pairs.expert_N] = 1
    return wanted_TE.T @ wanted_TE


def _ranks_per_machine(group_size: int) -> int:
    """Neighbours of a group that are on one machine, on every machine; collective over all ranks."""
    hosts = [len(list(ranks)) for _, ranks in groupby(gather_objects(socket.gethostname()))]
    return math.gcd(group_size, *hosts)
