"""The plan of a run on many nodes: its step by either exchange, and its memory, at one size or at several.

For models with attention rows, FLOPs, bytes and memory alone are planned: the rates of a machine (machine.py) are of
products, rows and elementwise operations. Attention, norms and the loss over a vocabulary have none there, so the time
of a step of such a model is not predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dist_moe.engine.deepspeed.config import parameter_dtype, zero_stage
from dist_moe.errors import UserError
from dist_moe.planning.memory import MemoryPlan, optimizer_states, plan_memory
from dist_moe.planning.scale.machine import Machine
from dist_moe.planning.scale.spread import Layout, expected_spread
from dist_moe.planning.scale.step_time import (
    EXCHANGES,
    Bytes,
    ExchangeName,
    Prediction,
    exchange_bytes,
    gradient_bytes,
    predict,
)
from dist_moe.planning.scale.work import work_of_layer, work_of_model
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.size import planned_model
from dist_moe.tasks.task import Task


@dataclass(frozen=True)
class Assumed:
    """Assumptions beside the configuration. ``experts_per_token``: of a gate, measured (None: the gate's k).
    ``skew``: rows of the heaviest rank over the mean. ``tokens_per_rank``: makes the batch grow with the ranks
    (None: ``train.batch_size`` at every size)."""

    experts_per_token: float | None = None
    skew: float = 1.0
    tokens_per_rank: int | None = None

    def k(self, config: SupervisedConfig) -> float:
        """Return experts per token and gate, measured or configured. Raises UserError if no token can have them."""
        k, experts = self.experts_per_token, config.model.num_experts
        if k is None:
            return config.model.experts_per_token
        if not config.model.num_moe_layers:
            raise UserError(f"--experts-per-token={k:g} is given, but the model is dense; leave it out")
        if not 0 < k <= experts:
            raise UserError(f"--experts-per-token={k:g} must lie above 0 and up to model.num_experts={experts}")
        return k


@dataclass(frozen=True)
class PlannedSize:
    """A step at one size. ``predictions``: one per exchange. ``against_one``: by exchange, tokens per second and rank
    over those of one rank that takes the same batch alone. ``memory``: bytes of a rank, states and activations under
    even load."""

    layout: Layout
    batch_size: int
    predictions: tuple[Prediction, ...]
    against_one: tuple[float, ...]
    memory: int

    def plain(self) -> dict[str, Any]:
        """Return plain content for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StepTraffic:
    """A step on ``layout`` under uniform choices, without its time. ``tokens``: of a rank. ``expert_rows``: that a rank
    computes, all MoE layers. ``flops``: of a rank, forward and backward (None: not known of this model). ``sent``: by a
    rank in the exchanges of all MoE layers, by exchange. ``gradient_bytes``: sent by a rank in rings. ``memory``: bytes
    of a rank, states and activations."""

    layout: Layout
    batch_size: int
    tokens: float
    expert_rows: float
    flops: float | None
    sent: dict[ExchangeName, Bytes]
    gradient_bytes: float
    memory: int

    def plain(self) -> dict[str, Any]:
        """Return plain content for JSON."""
        return asdict(self) | {"seconds": None}


def plan_sizes(
    config: SupervisedConfig,
    task: Task,
    machine: Machine,
    nodes: Sequence[int],
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName] = EXCHANGES,
) -> list[PlannedSize]:
    """Return a training step on each number of ``nodes`` of ``per_node`` ranks, of a model with one MoE layer.

    On fewer nodes than the most, experts are split over as many ranks as the configuration asks for and there are,
    and no more skew is assumed than they can have. Raises UserError where anything does not fit.
    """
    planned = []
    for sized, layout, memory in _sizes(config, task, nodes, per_node, assumed):
        skew = min(assumed.skew, float(layout.group)) if layout.nodes < max(nodes) else assumed.skew
        k, width = assumed.k(sized), parameter_dtype(sized.deepspeed).itemsize
        work = work_of_model(planned_model(sized, task), sized, k, optimizer_states(sized)[0], width)
        tokens = sized.train.batch_size / layout.ranks
        predictions = tuple(predict(machine, work, layout, tokens, name, skew=skew) for name in exchanges)
        alone = predict(machine, work, Layout(1, 1, 1), tokens * layout.ranks).seconds.total
        against_one = tuple(alone / (layout.ranks * prediction.seconds.total) for prediction in predictions)
        planned.append(PlannedSize(layout, sized.train.batch_size, predictions, against_one, _held(memory)))
    return planned


def plan_traffic(
    config: SupervisedConfig,
    task: Task,
    nodes: Sequence[int],
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName] = EXCHANGES,
) -> list[StepTraffic]:
    """Return a training step on each number of ``nodes`` of ``per_node`` ranks, of any model.

    Raises UserError where anything does not fit.
    """
    planned, shape = [], task.example_shape()
    for sized, layout, memory in _sizes(config, task, nodes, per_node, assumed):
        model, k, width = planned_model(sized, task), assumed.k(sized), parameter_dtype(sized.deepspeed).itemsize
        tokens = sized.train.batch_size / layout.ranks * shape.tokens
        layers = []
        for layer in model.moe_layers.values():
            again = sized.model.activation_checkpointing
            in_layer = min(k, layer.experts.num_experts)  # layers may have different numbers of experts
            work = work_of_layer(layer.experts, layer.each_gate, in_layer, value_bytes=width, recompute=again)
            layers.append((work, expected_spread(work.experts, work.k, work.gates, tokens, layout)))
        sent = {}
        for name in exchanges:
            parts = [exchange_bytes(work, spread, name) for work, spread in layers]
            sent[name] = Bytes(*(sum(getattr(part, field.name) for part in parts) for field in fields(Bytes)))
        flops = model.training_flops_per_token(shape.places, _mean([work.k for work, _ in layers]))
        experts = {id(p) for layer in model.moe_layers.values() for p in layer.experts.parameters()}
        trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        expert_parameters = sum(count for key, count in trained.items() if key in experts)
        counts = (sum(trained.values()) - expert_parameters, expert_parameters)
        step = StepTraffic(
            layout,
            sized.train.batch_size,
            tokens,
            expert_rows=sum(spread.pairs.all for _, spread in layers),
            flops=None if flops is None else tokens * flops,
            sent=sent,
            gradient_bytes=sum(gradient_bytes(zero_stage(sized.deepspeed), *counts, width, layout)),
            memory=_held(memory),
        )
        planned.append(step)
    return planned


def sizes_up_to(nodes: int) -> list[int]:
    """Return 1, 2, 4, ... nodes, and ``nodes``."""
    powers = [2**power for power in range(nodes.bit_length()) if 2**power < nodes]
    return [*powers, nodes]


def _sizes(
    config: SupervisedConfig, task: Task, nodes: Sequence[int], per_node: int, assumed: Assumed
) -> Iterator[tuple[SupervisedConfig, Layout, MemoryPlan]]:
    """Yield ``config`` for each number of ``nodes``, with the batch that ``assumed`` says, and its memory.

    Experts are split over as many ranks as are asked for and there are.
    """
    for number in nodes:
        ranks = number * per_node
        parallel = config.parallel if number == max(nodes) else config.parallel.nearest_for(ranks)
        parallel = parallel.model_copy(update={"ranks_per_node": per_node, "exchange": "auto"})
        sized = config.model_copy(update={"parallel": parallel})
        if assumed.tokens_per_rank is not None:
            of_example = task.example_shape().tokens
            if assumed.tokens_per_rank < of_example:
                raise UserError(
                    f"--tokens-per-rank={assumed.tokens_per_rank}: an example has {of_example:g}; give as many"
                )
            batch = round(assumed.tokens_per_rank / of_example) * ranks
            sized = sized.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})
        layout = Layout(number, per_node, parallel.expert_parallel_size)
        yield sized, layout, plan_memory(sized, task, ranks)  # checks the configuration, too


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)


def _held(memory: MemoryPlan) -> int:
    """Return bytes of states and of activations under even load."""
    return memory.state.total + memory.buffers + memory.teachers + memory.loads[0].activations
