"""The time of a training step: a sum of what is computed, moved and sent, each at a rate of the machine.

Nothing overlaps but what docs/plan.md names: steps of a collective wait for the slowest rank, so the heaviest
rank counts wherever the load is not even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from dist_moe.errors import UserError
from dist_moe.planning.scale.layout import Layout
from dist_moe.planning.scale.machine import Link, Machine
from dist_moe.planning.scale.spread import Level, Spread, expected_spread, missed_by_draws
from dist_moe.planning.scale.work import Work

ExchangeName = Literal["flat", "two_level"]
EXCHANGES: tuple[ExchangeName, ...] = ("flat", "two_level")

BACKWARD = 2
"""FLOPs of the backward pass per one of the forward pass."""

_KEY_BYTES, _WEIGHT_BYTES = 8, 4
_COLLECTIVES_PER_LEVEL = 5
"""Collectives per level of an exchange: the counts; rows there and back, forward and backward."""
_SMALL_COLLECTIVES = 4
"""Number of small collectives per training step, independent of its size: overflow flag, two gradient norms, one
counter."""
_SORTS_PER_PAIR = 2
_INDEX_BYTES_PER_PAIR = 100
"""Bytes of int64 keys, places and counts that are read and written for a pair at each level."""
_GRADIENT_ACCESSES, _OPTIMIZER_ACCESSES, _STATE_ACCESSES = 16, 11, 7
"""Accesses of fp32 numbers, counted in DeepSpeed's ZeRO 1 and torch's Adam. Per parameter: gradient written, copied
into a bucket, divided, flattened, reduced in place, copied back, and the parameter gathered. Per parameter that a rank
updates: gradient taken, normed, scaled, parameter updated and copied. Then per state of such a parameter."""


@dataclass(frozen=True)
class Bytes:
    """Bytes that a rank sends in a step. ``rows``: token rows, results, sums, and their gradients; ``lists``: the pairs
    that travel with them in two levels. ``inside``, ``between``: to ranks of the same node, of other nodes."""

    inside: float
    between: float
    rows: float
    lists: float

    @property
    def total(self) -> float:
        """All of it, within nodes and between them."""
        return self.inside + self.between


@dataclass(frozen=True)
class Seconds:
    """Step time in seconds, by component. ``moves``: rows gathered, regrouped and mixed where they are;
    ``wire``: the exchange's collectives; ``gradients``: their reduction and the gathering of parameters."""

    dense: float
    experts: float
    moves: float
    wire: float
    gradients: float
    optimizer: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Prediction:
    """One step on ``layout``. ``exchange_bytes``: per rank; ``gradient_bytes``: per rank, by a ring.
    ``efficiency``: share of the step in which products are computed that an even load would need, too."""

    layout: Layout
    exchange: ExchangeName
    tokens: float
    seconds: Seconds
    exchange_bytes: Bytes
    gradient_bytes: float
    efficiency: float


def predict(
    machine: Machine,
    work: Work,
    layout: Layout,
    tokens: float,
    exchange: ExchangeName = "flat",
    *,
    skew: float = 1.0,
    training: bool = True,
) -> Prediction:
    """Return a step of ``tokens`` per rank, of uniform choices. ``skew``: rows of the heaviest rank over the mean.

    ``training``: with gradients and optimizer; else the layer alone.

    Raises UserError where the layout does not fit the model, or the machine has no links that it needs.
    """
    _check(machine, work, layout, skew)
    spread = expected_spread(work.experts, work.k, work.gates, tokens, layout)
    sharing = max(1.0, layout.per_node / machine.processors_per_node)
    dense = sharing * _dense_seconds(machine, work, tokens)
    even = sharing * _expert_products(machine, work, layout, spread.pairs.all)
    experts = sharing * _expert_products(machine, work, layout, spread.pairs.all * skew)
    experts += sharing * spread.pairs.all * skew * 4 * work.expert_elements / machine.elementwise_bytes_per_s
    seconds = Seconds(
        dense=dense,
        experts=experts,
        moves=sharing * _move_seconds(machine, work, layout, spread, tokens, exchange, skew),
        wire=_wire_seconds(machine, work, layout, spread, exchange, skew, sharing),
        gradients=_gradient_seconds(machine, work, layout, sharing) if training else 0.0,
        optimizer=sharing * _optimizer_seconds(machine, work, layout) if training else 0.0,
        fixed=sharing * (machine.step_fixed_s if training else machine.layer_fixed_s),
    )
    computed = sharing * _products(machine, work.dense_flops, tokens) + even
    sent = exchange_bytes(work, spread, exchange)
    gradients = sum(volume for volume, _ in _reductions_of(work, layout)) if training else 0.0
    return Prediction(layout, exchange, tokens, seconds, sent, gradients, computed / seconds.total)


def exchange_bytes(work: Work, spread: Spread, exchange: ExchangeName) -> Bytes:
    """Return what a rank sends in the exchange, forward and backward: as its layer counts it."""
    row, result = work.dim * work.value_bytes, work.out_dim * work.value_bytes
    if exchange == "flat" or spread.across is None:
        pairs = spread.pairs
        per_pair = 2 * (row + result) + (row if work.recompute else 0)
        return Bytes((pairs.away - pairs.across) * per_pair, pairs.across * per_pair, pairs.away * per_pair, 0.0)
    levels = [level for level in (spread.across, spread.within) if level is not None]
    parts = [_level_bytes(work, level) for level in levels]
    across = sum(parts[0])
    return Bytes(
        sum(map(sum, parts)) - across, across, sum(rows for rows, _ in parts), sum(lists for _, lists in parts)
    )


def _level_bytes(work: Work, level: Level) -> tuple[float, float]:
    """Return bytes of rows and sums; and of lists: keys there, weights there and their gradients back."""
    rows = 2 * level.rows.away * work.dim * work.value_bytes + 2 * level.sums.away * work.out_dim * _WEIGHT_BYTES
    return rows, level.pairs.away * (_KEY_BYTES + 2 * _WEIGHT_BYTES * work.gates)


def _check(machine: Machine, work: Work, layout: Layout, skew: float) -> None:
    if work.experts % layout.group:
        raise UserError(
            f"parallel.expert_parallel_size={layout.group} does not divide model.num_experts={work.experts}; choose "
            f"a size that divides both the ranks and the experts"
        )
    if not 1 <= skew <= layout.group:
        raise UserError(
            f"--skew={skew:g} must lie in 1..{layout.group}: the heaviest rank's rows over the mean, among the ranks "
            f"over which experts are split"
        )
    for name, link, needed in (
        ("inside", machine.inside, layout.per_node > 1),
        ("between", machine.between, layout.nodes > 1),
    ):
        if needed and link is None:
            raise UserError(
                f"the machine {machine.name!r} has no field {name!r}, which {layout.nodes} node(s) of "
                f"{layout.per_node} rank(s) need; measure it with 'dist-moe plan --measure FILE.yaml' on several "
                f"{'ranks' if name == 'inside' else 'nodes'}, or write it into the file"
            )


def _products(machine: Machine, flops: float, rows: float) -> float:
    """Return seconds of products, forward and backward, ``rows`` of which share each weight; ``flops``: of one row."""
    return (1 + BACKWARD) * flops * rows / machine.flop_per_s(max(rows, 1.0)) if rows else 0.0


def _expert_products(machine: Machine, work: Work, layout: Layout, rows: float) -> float:
    """Return seconds of the experts' products; ``rows``: that a rank computes, evenly over its experts."""
    local = work.experts / layout.group
    return local * _products(machine, work.expert_flops, rows / local)


def _dense_seconds(machine: Machine, work: Work, tokens: float) -> float:
    elementwise = 4 * work.dense_elements * tokens / machine.elementwise_bytes_per_s
    return _products(machine, work.dense_flops, tokens) + elementwise + work.slots * tokens / machine.sort_keys_per_s


def _move_seconds(
    machine: Machine, work: Work, layout: Layout, spread: Spread, tokens: float, exchange: ExchangeName, skew: float
) -> float:
    """Rows gathered and regrouped in memory, pairs sorted, results mixed, forward and backward."""
    keys = _pair_seconds(machine, spread.pairs.all)
    if exchange == "flat" or spread.across is None:
        moved = _gathering(machine, work, spread.pairs.all, tokens)
        if layout.group > 1:
            moved += _regrouping(machine, work, spread.pairs.all * skew)
        return keys + moved + _mixing(machine, work, spread.pairs.all)
    seconds, here = keys, tokens
    for level in (spread.across, spread.within):
        if level is not None:
            seconds += _pair_seconds(machine, level.pairs.all) + _packing(machine, work, level, here)
            here = level.rows.all
    pairs = spread.pairs.all * skew
    return seconds + _gathering(machine, work, pairs, here) + _mixing(machine, work, pairs)


def _pair_seconds(machine: Machine, pairs: float) -> float:
    indices = _INDEX_BYTES_PER_PAIR / machine.elementwise_bytes_per_s
    return pairs * (_SORTS_PER_PAIR / machine.sort_keys_per_s + indices)


def _gathering(machine: Machine, work: Work, pairs: float, rows: float) -> float:
    """A row per pair out of the token rows; their gradients added into these, which are zeroed before."""
    row = work.dim * work.value_bytes
    return pairs * row * (2 / machine.index_bytes_per_s + 3 / machine.scatter_bytes_per_s) + (
        rows * row / machine.elementwise_bytes_per_s
    )


def _regrouping(machine: Machine, work: Work, pairs: float) -> float:
    """What arrives, by expert, and results back, each with its gradients."""
    row, result = work.dim * work.value_bytes, work.out_dim * work.value_bytes
    order = 2 * row + 4 * result
    added = 3 * row / machine.scatter_bytes_per_s + row / machine.elementwise_bytes_per_s
    return pairs * (order / machine.index_bytes_per_s + added)


def _mixing(machine: Machine, work: Work, pairs: float) -> float:
    return pairs * work.out_dim * work.value_bytes * work.gates / machine.combine_bytes_per_s


def _packing(machine: Machine, work: Work, level: Level, rows_before: float) -> float:
    """Rows selected, packed and unpacked; sums selected, and added where they return. With all gradients."""
    row, result = work.dim * work.value_bytes, work.out_dim * _WEIGHT_BYTES
    copied = level.rows.all * 10 * row + level.sums.all * 4 * result
    zeroed = rows_before * row + work.gates * (rows_before + level.rows.all) * result
    added = level.rows.all * 3 * row + level.sums.all * 6 * result
    return (copied + zeroed) / machine.elementwise_bytes_per_s + added / machine.scatter_bytes_per_s


def _wire_seconds(
    machine: Machine, work: Work, layout: Layout, spread: Spread, exchange: ExchangeName, skew: float, sharing: float
) -> float:
    if layout.group == 1:
        return 0.0
    sent, of_node = exchange_bytes(work, spread, exchange), node_skew(layout, skew)
    inside = sharing * sent.inside / machine.inside.all_to_all_bytes_per_s if machine.inside else 0.0
    between = sent.between * layout.group_in_node * _groups_per_node(layout)
    across = between / machine.between.all_to_all_bytes_per_s if machine.between else 0.0
    if exchange == "flat" or spread.across is None:
        latency = _latency(machine, layout.group - 1, layout.nodes_of_group > 1, sharing)
        return max(skew * inside, of_node * across) + _COLLECTIVES_PER_LEVEL * latency
    latencies = _latency(machine, layout.nodes_of_group - 1, True, sharing)
    latencies += _latency(machine, layout.group_in_node - 1, False, sharing)
    inside *= row_skew(work, layout.group, skew)
    across *= row_skew(work, layout.nodes_of_group, of_node)
    return inside + across + _COLLECTIVES_PER_LEVEL * latencies


def node_skew(layout: Layout, skew: float) -> float:
    """Return the heaviest node's load over the mean, if ranks' loads are independent: their excess averages out."""
    return float(min(1 + (skew - 1) / math.sqrt(layout.group_in_node), layout.nodes_of_group))


def row_skew(work: Work, parts: int, skew: float) -> float:
    """Return the skew of token rows that go to one of ``parts``, where ``skew`` times the mean of pairs goes there: a
    token that needs several of its experts is sent once."""
    needed, mean = (1 - missed_by_draws(work.experts, parts, work.k, s) ** work.gates for s in (skew, 1.0))
    return needed / mean


def _groups_per_node(layout: Layout) -> int:
    """Groups of which a node has ranks; each sends its own bytes over the node's link."""
    return layout.per_node // layout.group_in_node


def _latency(machine: Machine, peers: int, is_across: bool, sharing: float) -> float:
    link = machine.between if is_across else machine.inside
    return sharing * peers * link.latency_s if link is not None and peers else 0.0


def gradient_bytes(stage: int, dense: float, experts: float, value_bytes: int, layout: Layout) -> float:
    """Return what a rank sends in all reductions of a step; ``dense``, ``experts``: parameters of the whole model."""
    return sum(volume for volume, _ in _reductions(stage, dense, experts, value_bytes, layout))


def _reductions(stage: int, dense: float, experts: float, value_bytes: int, layout: Layout) -> list[tuple[float, bool]]:
    """Bytes that a rank sends in each reduction, and whether it is of experts.

    ZeRO 0: all-reduce, 2 (s - 1) / s of the gradients. 1 and 2: the same, as DeepSpeed all-reduces its buckets and
    keeps a part, then gathers the parameters, (s - 1) / s of them. 3: parameters gathered forward and backward, and
    gradients scattered, once each.
    """
    times = {0: 2.0, 1: 3.0, 2: 3.0, 3: 3.0}[stage] * value_bytes
    return [
        (times * dense * (1 - 1 / layout.ranks), False),
        (times * experts / layout.group * (1 - 1 / layout.copies), True),
    ]


def _reductions_of(work: Work, layout: Layout) -> list[tuple[float, bool]]:
    return _reductions(work.stage, work.dense_parameters, work.expert_parameters, work.value_bytes, layout)


def _gradient_seconds(machine: Machine, work: Work, layout: Layout, sharing: float) -> float:
    """Rings: as fast as their slowest link. Rings of experts that cross nodes share their links."""
    if layout.ranks == 1:
        return 0.0
    seconds = 0.0
    for volume, is_expert in _reductions_of(work, layout):
        size = layout.copies if is_expert else layout.ranks
        in_node = max(1, layout.per_node // layout.group_in_node) if is_expert else layout.per_node
        slowest = sharing / _reduce_rate(machine.inside) if in_node > 1 else 0.0
        if size > in_node:
            rings = layout.group_in_node if is_expert else 1
            slowest = max(slowest, rings / _reduce_rate(machine.between))
        seconds += volume * slowest
    return seconds + small_collectives_seconds(machine.between if layout.nodes > 1 else machine.inside, layout, sharing)


def small_collectives_seconds(link: Link | None, layout: Layout, sharing: float) -> float:
    """Return the seconds of a training step's reductions of a few numbers: up and down a tree of the ranks."""
    if link is None:
        return 0.0
    return sharing * _SMALL_COLLECTIVES * 2 * math.log2(layout.ranks) * link.latency_s


def _reduce_rate(link: Link | None) -> float:
    assert link is not None, "checked beforehand"
    return link.all_reduce_bytes_per_s


def _optimizer_seconds(machine: Machine, work: Work, layout: Layout) -> float:
    held = (work.dense_parameters, work.expert_parameters / layout.group)
    shares = (layout.ranks, layout.copies) if work.stage else (1, 1)
    updated = sum(count / share for count, share in zip(held, shares, strict=True))
    accesses = _GRADIENT_ACCESSES * sum(held) + (_OPTIMIZER_ACCESSES + _STATE_ACCESSES * work.states) * updated
    return 4 * accesses / machine.elementwise_bytes_per_s
