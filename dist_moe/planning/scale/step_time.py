"""The time of a training step: a sum of what is computed, moved and sent, each at a rate of the machine.

Nothing overlaps but what docs/plan.md names: steps of a collective wait for the slowest rank, so the heaviest
rank counts wherever the load is not even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from dist_moe.errors import UserError
from dist_moe.planning.scale.machine import Link, Machine
from dist_moe.planning.scale.spread import Layout, Spread, expected_spread, missed_by_draws
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
    local, pairs = work.experts / layout.group, spread.pairs.all
    products = _products(machine, work.dense_flops, tokens)
    elementwise = 4 * work.dense_elements * tokens / machine.elementwise_bytes_per_s
    even, uneven = (local * _products(machine, work.expert_flops, rows / local) for rows in (pairs, pairs * skew))
    uneven += pairs * skew * 4 * work.expert_elements / machine.elementwise_bytes_per_s
    sent = exchange_bytes(work, spread, exchange)
    reduced = gradient_bytes(work.stage, work.dense_parameters, work.expert_parameters, work.value_bytes, layout)
    seconds = Seconds(
        dense=sharing * (products + elementwise + work.slots * tokens / machine.sort_keys_per_s),
        experts=sharing * uneven,
        moves=sharing * _move_seconds(machine, work, layout, spread, tokens, exchange, skew),
        wire=_wire_seconds(machine, work, layout, spread, exchange, skew, sharing),
        gradients=_gradient_seconds(machine, reduced, layout, sharing) if training else 0.0,
        optimizer=sharing * _optimizer_seconds(machine, work, layout) if training else 0.0,
        fixed=sharing * (machine.step_fixed_s if training else machine.layer_fixed_s),
    )
    efficiency = sharing * (products + even) / seconds.total
    return Prediction(layout, exchange, tokens, seconds, sent, sum(reduced) if training else 0.0, efficiency)


def exchange_bytes(work: Work, spread: Spread, exchange: ExchangeName) -> Bytes:
    """Return what a rank sends in the exchange, forward and backward: as its layer counts it."""
    row, result = work.dim * work.value_bytes, work.out_dim * work.value_bytes
    if exchange == "flat" or spread.across is None:
        pairs = spread.pairs
        per_pair = 2 * (row + result) + (row if work.recompute else 0)
        return Bytes((pairs.away - pairs.across) * per_pair, pairs.across * per_pair, pairs.away * per_pair, 0.0)
    sent = []
    for level in (spread.across, spread.within):
        if level is not None:
            rows = 2 * level.rows.away * row + 2 * level.sums.away * work.out_dim * _WEIGHT_BYTES
            lists = level.pairs.away * (_KEY_BYTES + 2 * _WEIGHT_BYTES * work.gates)  # there; gradients of weights back
            sent.append((rows, lists))
    across, within = sum(sent[0]), sum(map(sum, sent[1:]))
    return Bytes(within, across, sum(rows for rows, _ in sent), sum(lists for _, lists in sent))


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


def _move_seconds(
    machine: Machine, work: Work, layout: Layout, spread: Spread, tokens: float, exchange: ExchangeName, skew: float
) -> float:
    """Return seconds of rows gathered and regrouped in memory, pairs sorted, results mixed, forward and backward."""
    row, result = work.dim * work.value_bytes, work.out_dim * work.value_bytes
    elementwise, index, scatter = (
        machine.elementwise_bytes_per_s,
        machine.index_bytes_per_s,
        machine.scatter_bytes_per_s,
    )
    listing = _SORTS_PER_PAIR / machine.sort_keys_per_s + _INDEX_BYTES_PER_PAIR / elementwise
    seconds, here, pairs = spread.pairs.all * listing, tokens, spread.pairs.all
    if exchange == "flat" or spread.across is None:
        if layout.group > 1:
            # Rows that arrive are put in the order of experts, and results back, each with its gradients.
            added = 3 * row / scatter + row / elementwise
            seconds += pairs * skew * ((2 * row + 4 * result) / index + added)
    else:
        pairs *= skew
        for level in (spread.across, spread.within):
            if level is None:
                continue
            # Rows selected, packed and unpacked; sums (fp32) selected, and added where they return. With all gradients.
            summed = work.out_dim * _WEIGHT_BYTES
            copied = level.rows.all * 10 * row + level.sums.all * 4 * summed
            zeroed = here * row + work.gates * (here + level.rows.all) * summed
            added = level.rows.all * 3 * row + level.sums.all * 6 * summed
            seconds += level.pairs.all * listing + (copied + zeroed) / elementwise + added / scatter
            here = level.rows.all
    # A row per pair out of the token rows; their gradients added into these, which are zeroed before.
    gathered = pairs * row * (2 / index + 3 / scatter) + here * row / elementwise
    return seconds + gathered + pairs * result * work.gates / machine.combine_bytes_per_s


def _wire_seconds(
    machine: Machine, work: Work, layout: Layout, spread: Spread, exchange: ExchangeName, skew: float, sharing: float
) -> float:
    if layout.group == 1:
        return 0.0
    sent, of_node = exchange_bytes(work, spread, exchange), node_skew(layout, skew)
    inside = sharing * sent.inside / machine.inside.all_to_all_bytes_per_s if machine.inside else 0.0
    # Each group of which a node has ranks sends its own bytes over the node's link.
    between = sent.between * layout.group_in_node * layout.groups_per_node
    across = between / machine.between.all_to_all_bytes_per_s if machine.between else 0.0

    def latency(link: Link | None, peers: int) -> float:
        return sharing * peers * link.latency_s if link is not None and peers else 0.0

    if exchange == "flat" or spread.across is None:
        waited = latency(machine.between if layout.nodes_of_group > 1 else machine.inside, layout.group - 1)
        return max(skew * inside, of_node * across) + _COLLECTIVES_PER_LEVEL * waited
    waited = latency(machine.between, layout.nodes_of_group - 1) + latency(machine.inside, layout.group_in_node - 1)
    inside *= row_skew(work, layout.group, skew)
    across *= row_skew(work, layout.nodes_of_group, of_node)
    return inside + across + _COLLECTIVES_PER_LEVEL * waited


def node_skew(layout: Layout, skew: float) -> float:
    """Return the heaviest node's load over the mean, if ranks' loads are independent: their excess averages out."""
    return float(min(1 + (skew - 1) / math.sqrt(layout.group_in_node), layout.nodes_of_group))


def row_skew(work: Work, parts: int, skew: float) -> float:
    """Return the skew of token rows that go to one of ``parts``, where ``skew`` times the mean of pairs goes there: a
    token that needs several of its experts is sent once."""
    needed, mean = (1 - missed_by_draws(work.experts, parts, work.k, s) ** work.gates for s in (skew, 1.0))
    return needed / mean


def gradient_bytes(stage: int, dense: float, experts: float, value_bytes: int, layout: Layout) -> tuple[float, float]:
    """Return what a rank sends in all reductions of a step, of dense parameters and of experts'.

    ``dense``, ``experts``: parameters of the whole model. ZeRO 0: all-reduce, 2 (s - 1) / s of the gradients. 1 and 2:
    the same, as DeepSpeed all-reduces its buckets and keeps a part, then gathers the parameters, (s - 1) / s of them.
    3: parameters gathered forward and backward, and gradients scattered, once each.
    """
    times = (2.0 if stage == 0 else 3.0) * value_bytes
    return times * dense * (1 - 1 / layout.ranks), times * experts / layout.group * (1 - 1 / layout.copies)


def _gradient_seconds(machine: Machine, reduced: tuple[float, float], layout: Layout, sharing: float) -> float:
    """Return seconds of rings: as fast as their slowest link. Rings of experts that cross nodes share their links."""
    if layout.ranks == 1:
        return 0.0
    # A link that there is not is not used: the layout was checked.
    inside, between = (link.all_reduce_bytes_per_s if link else math.inf for link in (machine.inside, machine.between))
    rings = ((layout.ranks, layout.per_node, 1), (layout.copies, layout.groups_per_node, layout.group_in_node))
    seconds = 0.0
    for volume, (size, in_node, number) in zip(reduced, rings, strict=True):
        slowest = sharing / inside if in_node > 1 else 0.0
        if size > in_node:
            slowest = max(slowest, number / between)
        seconds += volume * slowest
    return seconds + small_collectives_seconds(machine.between if layout.nodes > 1 else machine.inside, layout, sharing)


def small_collectives_seconds(link: Link | None, layout: Layout, sharing: float) -> float:
    """Return the seconds of a training step's reductions of a few numbers: up and down a tree of the ranks."""
    if link is None:
        return 0.0
    return sharing * _SMALL_COLLECTIVES * 2 * math.log2(layout.ranks) * link.latency_s


def _optimizer_seconds(machine: Machine, work: Work, layout: Layout) -> float:
    held = (work.dense_parameters, work.expert_parameters / layout.group)
    shares = (layout.ranks, layout.copies) if work.stage else (1, 1)
    updated = sum(count / share for count, share in zip(held, shares, strict=True))
    accesses = _GRADIENT_ACCESSES * sum(held) + (_OPTIMIZER_ACCESSES + _STATE_ACCESSES * work.states) * updated
    return 4 * accesses / machine.elementwise_bytes_per_s
