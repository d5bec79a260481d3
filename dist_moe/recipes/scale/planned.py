"""The plan of a run on many nodes: its step by either exchange, and its memory, at one size or at several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.memory_plan import bytes_per_parameter, optimizer_states, plan_memory
from dist_moe.recipes.models import build_model
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.scale.layout import Layout
from dist_moe.recipes.scale.machine import Machine
from dist_moe.recipes.scale.step_time import EXCHANGES, ExchangeName, Prediction, predict
from dist_moe.recipes.scale.work import Work, work_of_model


@dataclass(frozen=True)
class Assumed:
    """What the configuration does not tell. ``experts_per_token``: of a gate, measured (None: the gate's k).
    ``skew``: rows of the heaviest rank over the mean. ``tokens_per_rank``: makes the batch grow with the ranks
    (None: ``train.batch_size`` at every size)."""

    experts_per_token: float | None = None
    skew: float = 1.0
    tokens_per_rank: int | None = None


@dataclass(frozen=True)
class PlannedSize:
    """``predictions``: one per exchange. ``against_one``: by exchange, tokens per second and rank over those of one
    rank that takes the same batch alone. ``memory``: bytes of a rank, states and activations, even load."""

    layout: Layout
    batch_size: int
    predictions: tuple[Prediction, ...]
    against_one: tuple[float, ...]
    memory: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def plan_sizes(
    config: RunConfig,
    problem: Problem,
    machine: Machine,
    nodes: Sequence[int],
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName] = EXCHANGES,
) -> list[PlannedSize]:
    """A training step on each number of ``nodes`` of ``per_node`` ranks.

    On fewer nodes than the most, experts are split over as many ranks as the configuration asks for and there are,
    and no more skew is assumed than they can have. Raises UserError where anything does not fit.
    """
    most = max(nodes)
    planned = []
    for number in nodes:
        ranks = number * per_node
        parallel = config.parallel if number == most else config.parallel.nearest_for(ranks)
        parallel = parallel.model_copy(update={"ranks_per_node": per_node, "exchange": "auto"})
        skew = assumed.skew if number == most else min(assumed.skew, float(parallel.expert_parallel_size))
        sized = _sized(config.model_copy(update={"parallel": parallel}), ranks, assumed)
        there = replace(assumed, skew=skew)
        planned.append(_plan_size(sized, problem, machine, number, per_node, there, exchanges))
    return planned


def _plan_size(
    config: RunConfig,
    problem: Problem,
    machine: Machine,
    nodes: int,
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName],
) -> PlannedSize:
    layout = Layout(nodes, per_node, config.parallel.expert_parallel_size)
    memory = plan_memory(config, problem, layout.ranks)  # checks the configuration, too
    work = planned_work(config, problem).with_k(assumed.experts_per_token)
    if not 0 < work.k <= work.experts:
        raise UserError(f"--experts-per-token={work.k:g} must lie above 0 and up to model.num_experts={work.experts}")
    tokens = config.train.batch_size / layout.ranks
    predictions = tuple(predict(machine, work, layout, tokens, name, skew=assumed.skew) for name in exchanges)
    alone = predict(machine, work, Layout(1, 1, 1), tokens * layout.ranks).seconds.total
    against_one = tuple(alone / (layout.ranks * prediction.seconds.total) for prediction in predictions)
    held = memory.state.total + memory.buffers + memory.loads[0].activations
    return PlannedSize(layout, config.train.batch_size, predictions, against_one, held)


def planned_work(config: RunConfig, problem: Problem) -> Work:
    """Of the whole model of ``config``, which is built without storage."""
    with torch.device("meta"):
        model: MoEModel = build_model(config, problem, SingleWorld())
    return work_of_model(model, config, optimizer_states(config)[0], bytes_per_parameter(config))


def sizes_up_to(nodes: int) -> list[int]:
    """1, 2, 4, ... nodes, and ``nodes``."""
    powers = [2**power for power in range(nodes.bit_length()) if 2**power < nodes]
    return [*powers, nodes]


def _sized(config: RunConfig, ranks: int, assumed: Assumed) -> RunConfig:
    if assumed.tokens_per_rank is None:
        return config
    train = config.train.model_copy(update={"batch_size": assumed.tokens_per_rank * ranks})
    return config.model_copy(update={"train": train})
