"""What a step of a model with attention computes and sends on many nodes: FLOPs, rows, bytes, memory; no seconds.

The rates of a machine (machine.py) are of products, rows and elementwise operations. Attention, norms and the loss over
a vocabulary have none there, so the time of a step of such a model is not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_moe.engine.deepspeed.config import zero_stage
from dist_moe.models import MoEModel, Transformer
from dist_moe.planning.memory import bytes_per_parameter, plan_memory, planned_model
from dist_moe.planning.scale.layout import Layout
from dist_moe.planning.scale.planned import Assumed, check_experts_per_token, configs_by_size
from dist_moe.planning.scale.spread import expected_spread
from dist_moe.planning.scale.step_time import EXCHANGES, Bytes, ExchangeName, exchange_bytes, gradient_bytes
from dist_moe.planning.scale.work import Work, work_of_layer
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks.task import Task


@dataclass(frozen=True)
class StepTraffic:
    """Of a step on ``layout``, uniform choices. ``tokens``: of a rank. ``expert_rows``: that a rank computes, all MoE
    layers. ``flops``: of a rank, forward and backward (None: not known of this model). ``sent``: by a rank in the
    exchanges of all MoE layers, by exchange. ``gradient_bytes``: sent by a rank in rings. ``memory``: bytes of a rank,
    states and activations."""

    layout: Layout
    batch_size: int
    tokens: float
    expert_rows: float
    flops: float | None
    sent: dict[ExchangeName, Bytes]
    gradient_bytes: float
    memory: int

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": None}


def plan_traffic(
    config: SupervisedConfig,
    task: Task,
    nodes: Sequence[int],
    per_node: int,
    assumed: Assumed,
    exchanges: Sequence[ExchangeName] = EXCHANGES,
) -> list[StepTraffic]:
    """A training step on each number of ``nodes`` of ``per_node`` ranks. Raises UserError where it does not fit."""
    planned = []
    for number, sized in zip(nodes, configs_by_size(config, nodes, per_node, assumed, task), strict=True):
        layout = Layout(number, per_node, sized.parallel.expert_parallel_size)
        planned.append(_plan_step(sized, task, layout, assumed, exchanges))
    return planned


def _plan_step(
    config: SupervisedConfig, task: Task, layout: Layout, assumed: Assumed, exchanges: Sequence[ExchangeName]
) -> StepTraffic:
    memory = plan_memory(config, task, layout.ranks)  # checks the configuration, too
    model = planned_model(config, task)
    works = _works(model, config, assumed)
    tokens = config.train.batch_size / layout.ranks * task.example_shape().tokens
    spreads = [expected_spread(work.experts, work.k, work.gates, tokens, layout) for work in works]
    layers = list(zip(works, spreads, strict=True))
    sent = {name: _sum([exchange_bytes(work, spread, name) for work, spread in layers]) for name in exchanges}
    experts = {id(p) for layer in model.moe_layers.values() for p in layer.experts.parameters()}
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    expert_parameters = sum(count for key, count in trained.items() if key in experts)
    return StepTraffic(
        layout,
        config.train.batch_size,
        tokens,
        sum(spread.pairs.all for spread in spreads),
        _flops(model, works, task, tokens),
        sent,
        gradient_bytes(
            zero_stage(config.deepspeed),
            sum(trained.values()) - expert_parameters,
            expert_parameters,
            bytes_per_parameter(config),
            layout,
        ),
        memory.state.total + memory.buffers + memory.loads[0].activations,
    )


def _works(model: MoEModel, config: SupervisedConfig, assumed: Assumed) -> list[Work]:
    """Of each MoE layer."""
    k = config.model.experts_per_token
    if assumed.experts_per_token is not None:
        check_experts_per_token(assumed.experts_per_token, config.model.num_experts if model.moe_layers else 0)
    width, recompute = bytes_per_parameter(config), config.model.activation_checkpointing
    works = []
    for layer in model.moe_layers.values():
        work = work_of_layer(layer.experts, layer.each_gate, k, value_bytes=width, recompute=recompute)
        works.append(work.with_k(assumed.experts_per_token))
    return works


def _flops(model: MoEModel, works: Sequence[Work], task: Task, tokens: float) -> float | None:
    if not isinstance(model, Transformer):
        return None
    k = works[0].k if works else 0.0
    return tokens * model.size.training_flops_per_token(task.example_shape().places, k)


def _sum(parts: Sequence[Bytes]) -> Bytes:
    names = ("inside", "between", "rows", "lists")
    return Bytes(*(sum(getattr(part, name) for part in parts) for name in names))


def traffic_table(model: str, steps: Sequence[StepTraffic]) -> str:
    """A row per size and exchange, and what is not predicted. ``model``: its name."""
    columns = ("tokens", "rows", "TFLOP", "inside", "between", "gradients", "memory")
    lines = [
        f"{'':31}{'':33}{' MB sent by a rank ':-^33}",
        f"{'nodes x ranks':14}{'split':>6} {'exchange':10}" + "".join(f"{name:>11}" for name in columns),
    ]
    lines += [_row(step, name) for step in steps for name in step.sent]
    return "\n".join([*lines, *(line.format(model=model) for line in _LEGEND)])


_LEGEND = (
    "of a rank and step; rows: that its experts compute in all MoE layers; TFLOP: forward and backward;",
    "memory: states and activations under even load.",
    "The time of a step is not predicted for model.name={model}: 'dist-moe plan --measure' has no rates of attention,",
    "norms and the loss over a vocabulary.",
)


def _row(step: StepTraffic, exchange: ExchangeName) -> str:
    sent = step.sent[exchange]
    place = f"{step.layout.nodes} x {step.layout.per_node}"
    figures = [
        f"{step.tokens:,.0f}",
        f"{step.expert_rows:,.0f}",
        "-" if step.flops is None else f"{step.flops / 1e12:.4g}",
    ]
    figures += [f"{count / 1e6:.4g}" for count in (sent.inside, sent.between, step.gradient_bytes)]
    figures += [f"{step.memory / 2**30:.2f} GiB"]
    return f"{place:14}{step.layout.group:>6} {exchange:10}" + "".join(f"{figure:>11}" for figure in figures)
