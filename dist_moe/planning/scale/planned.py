"""The plan of a run on many nodes: its step by either exchange, and its memory, at one size or at several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_moe.errors import UserError
from dist_moe.planning.memory import bytes_per_parameter, optimizer_states, plan_memory, planned_model
from dist_moe.planning.scale.layout import Layout
from dist_moe.planning.scale.machine import Machine
from dist_moe.planning.scale.step_time import EXCHANGES, ExchangeName, Prediction, predict
from dist_moe.planning.scale.work import Work, work_of_model
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks.task import Task


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
    config: SupervisedConfig,
    task: Task,
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
    planned = []
    for number, sized in zip(nodes, configs_by_size(config, nodes, per_node, assumed, task), strict=True):
        reduced = number < max(nodes)
        skew = min(assumed.skew, float(sized.parallel.expert_parallel_size)) if reduced else assumed.skew
        there = replace(assumed, skew=skew)
        planned.append(_plan_size(sized, task, machine, number, per_node, there, exchanges))
    return planned


def configs_by_size(
    config: SupervisedConfig, nodes: Sequence[int], per_node: int, assumed: Assumed, task: Task
) -> list[SupervisedConfig]:
    """``config`` for each number of ``nodes``: experts over as many ranks as are asked for and there are, and the batch
    that ``assumed`` says."""
    most, found = max(nodes), []
    for number in nodes:
        ranks = number * per_node
        parallel = config.parallel if number == most else config.parallel.nearest_for(ranks)
        parallel = parallel.model_copy(update={"ranks_per_node": per_node, "exchange": "auto"})
        found.append(_sized(config.model_copy(update={"parallel": parallel}), ranks, assumed, task))
    return found


def _plan_size(
    config: SupervisedConfig,
    task: Task,
    machine: Machine,
    nodes: int,
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName],
) -> PlannedSize:
    layout = Layout(nodes, per_node, config.parallel.expert_parallel_size)
    memory = plan_memory(config, task, layout.ranks)  # checks the configuration, too
    work = planned_work(config, task).with_k(assumed.experts_per_token)
    check_experts_per_token(work.k, work.experts)
    tokens = config.train.batch_size / layout.ranks
    predictions = tuple(predict(machine, work, layout, tokens, name, skew=assumed.skew) for name in exchanges)
    alone = predict(machine, work, Layout(1, 1, 1), tokens * layout.ranks).seconds.total
    against_one = tuple(alone / (layout.ranks * prediction.seconds.total) for prediction in predictions)
    held = memory.state.total + memory.buffers + memory.loads[0].activations
    return PlannedSize(layout, config.train.batch_size, predictions, against_one, held)


def planned_work(config: SupervisedConfig, task: Task) -> Work:
    """Of the whole model of ``config``, which is built without storage."""
    return work_of_model(planned_model(config, task), config, optimizer_states(config)[0], bytes_per_parameter(config))


def check_experts_per_token(k: float, experts: int) -> None:
    """Raise UserError for a number of experts that no token can have."""
    if not experts:
        raise UserError(f"--experts-per-token={k:g} is given, but the model is dense; leave it out")
    if not 0 < k <= experts:
        raise UserError(f"--experts-per-token={k:g} must lie above 0 and up to model.num_experts={experts}")


def sizes_up_to(nodes: int) -> list[int]:
    """1, 2, 4, ... nodes, and ``nodes``."""
    powers = [2**power for power in range(nodes.bit_length()) if 2**power < nodes]
    return [*powers, nodes]


def _sized(config: SupervisedConfig, ranks: int, assumed: Assumed, task: Task) -> SupervisedConfig:
    if assumed.tokens_per_rank is None:
        return config
    of_example = task.example_shape().tokens
    if assumed.tokens_per_rank < of_example:
        raise UserError(f"--tokens-per-rank={assumed.tokens_per_rank}: an example has {of_example:g}; give as many")
    examples = round(assumed.tokens_per_rank / of_example)
    train = config.train.model_copy(update={"batch_size": examples * ranks})
    return config.model_copy(update={"train": train})
