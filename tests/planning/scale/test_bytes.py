"""The bytes of the model are those that a real layer counts: exactly from its own choices, nearly from uniform ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import ProcessWorld, World, experts_of_rank
from dist_moe.planning.scale.spread import Layout, Level, Sent, Spread, expected_spread
from dist_moe.planning.scale.step_time import ExchangeName, exchange_bytes
from dist_moe.planning.scale.work import Work, work_of_layer
from tests.helpers.worlds import in_nodes, on_real_worlds, run_worlds

DIM, OUT, EXPERTS, TOKENS, K = 6, 5, 8, 50, 3

Choices = NDArray[np.bool_]
"""(R, G, T, E): whether gate g of rank r gives token t's expert e a weight that is not 0."""

Places = NDArray[np.int_]
Step = tuple[NDArray[np.bool_], int, int]
"""(G, T, E) choices of a rank, bytes that it sent, and those that went to another node."""


def gates() -> list[TopK]:
    return [TopK(DIM, EXPERTS, K), TopK(DIM, EXPERTS, K)]


def drawn(ranks: int) -> tuple[MoE, list[torch.Tensor]]:
    """A layer's gates and the tokens of every rank: the same on every rank, drawn before ranks run as threads."""
    torch.manual_seed(1)
    layer = MoE(gates(), DenseReLUBank(DIM, OUT, EXPERTS, range(EXPERTS)))
    return layer, [torch.randn(TOKENS + 7 * rank, DIM) for rank in range(ranks)]


def step(world: World, layer: MoE, tokens: list[torch.Tensor], bank: DenseReLUBank, recompute: bool) -> Step:
    split = MoE(list(layer.gates), bank, world=world, recompute_experts=recompute)  # type: ignore[arg-type]
    x_TD = tokens[world.rank].clone().requires_grad_()
    world.traffic.reset()
    result = split(x_TD)
    sum(output.sum() for output in result.outputs).backward()
    chosen = np.zeros((len(split.gates), len(x_TD), EXPERTS), dtype=bool)
    for gate, route in enumerate(result.routes):
        chosen[gate, route.token_N, route.slot_N] = True
    return chosen, world.traffic.bytes, world.traffic.bytes_across_nodes


def on_process(world: ProcessWorld, per_node: int | None, recompute: bool) -> Step:
    if per_node is not None:
        world = in_nodes(world, per_node)
    layer, tokens = drawn(world.size)
    bank = DenseReLUBank(DIM, OUT, EXPERTS, experts_of_rank(EXPERTS, world))
    return step(world, layer, tokens, bank, recompute)


def work(recompute: bool = False) -> Work:
    layer = work_of_layer(DenseReLUBank(DIM, OUT, EXPERTS, range(2)), gates(), K)  # type: ignore[arg-type]
    return replace(layer, recompute=recompute)


def counted_spread(chosen: Choices, layout: Layout) -> Spread:
    """The exact spread of what was chosen on all ranks of a group, experts in the order of their ranks: the oracle."""
    group, nodes, inner = layout.group, layout.nodes_of_group, layout.group_in_node
    assert len(chosen) == group
    pairs_RTE: Choices = np.any(chosen, axis=1)
    rank_R, node_R, local_R = (np.arange(group), np.arange(group) // inner, np.arange(group) % inner)
    all_pairs = _by_part(pairs_RTE, group, counted=True)
    pairs = replace(_leaving(all_pairs, rank_R, rank_R), across=_leaving(all_pairs, node_R, node_R).away)
    # Within a node, a token of any node stands on the rank of its own local rank.
    across = _level(chosen, nodes, np.arange(nodes), node_R, True) if nodes > 1 else None
    within = _level(chosen, group, local_R, local_R, False) if inner > 1 else None
    return Spread(pairs, across, within)


def _level(chosen: Choices, parts: int, place_of_part: Places, place_of_rank: Places, is_across: bool) -> Level:
    pairs_RTE: Choices = np.any(chosen, axis=1)
    per_part = (_by_part(pairs_RTE, parts), _by_part(pairs_RTE, parts, counted=True), _by_part(chosen, parts))
    sent = (_leaving(numbers, place_of_part, place_of_rank) for numbers in per_part)
    return Level(*(replace(one, across=one.away if is_across else 0.0) for one in sent))


def _by_part(wanted: Choices, parts: int, counted: bool = False) -> Places:
    """(R, ..., E) -> (R, parts): tokens (of a gate each, if these are told apart) that want any expert of the part;
    ``counted``: once for each such expert."""
    of_part = wanted.reshape(len(wanted), -1, parts, wanted.shape[-1] // parts)
    return (of_part.sum(axis=-1) if counted else of_part.any(axis=-1)).sum(axis=1)


def _leaving(numbers: Places, place_of_part: Places, place_of_rank: Places) -> Sent:
    """Means over ranks of (R, parts) numbers: of all, and of those whose part is at another place than the rank."""
    away = numbers[place_of_rank[:, None] != place_of_part[None]].sum()
    return Sent(float(numbers.sum()) / len(numbers), float(away) / len(numbers), 0.0)


def padded(steps: list[Step]) -> Choices:
    """(R, G, T, E); ranks with fewer tokens have some that want nothing."""
    most = max(chosen.shape[1] for chosen, _, _ in steps)
    return np.stack([np.pad(chosen, ((0, 0), (0, most - chosen.shape[1]), (0, 0))) for chosen, _, _ in steps])


def check(steps: list[Step], spread: Spread, exchange: ExchangeName, recompute: bool = False) -> None:
    counted = exchange_bytes(work(recompute), spread, exchange)
    assert counted.total * len(steps) == pytest.approx(sum(sent for _, sent, _ in steps), abs=1e-6)
    assert counted.between * len(steps) == pytest.approx(sum(across for _, _, across in steps), abs=1e-6)
    assert counted.rows + counted.lists == pytest.approx(counted.total)
    assert counted.total > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_flat_on_two_real_ranks(recompute: bool) -> None:
    steps = on_real_worlds(2, on_process, None, recompute)
    check(steps, counted_spread(padded(steps), Layout(1, 2, 2)), "flat", recompute)


def test_two_levels_on_two_real_ranks_that_are_two_nodes() -> None:
    steps = on_real_worlds(2, on_process, 1, False)
    check(steps, counted_spread(padded(steps), Layout(2, 1, 2)), "two_level")


def test_two_levels_of_two_ranks_each() -> None:
    layer, tokens = drawn(4)
    banks = [DenseReLUBank(DIM, OUT, EXPERTS, range(2 * rank, 2 * rank + 2)) for rank in range(4)]

    def on_thread(world: ProcessWorld) -> Step:
        return step(in_nodes(world, 2), layer, tokens, banks[world.rank], False)

    steps = run_worlds(4, on_thread)
    check(steps, counted_spread(padded(steps), Layout(2, 2, 4)), "two_level")


@pytest.mark.parametrize("layout", [Layout(1, 4, 4), Layout(2, 2, 4), Layout(4, 1, 4), Layout(2, 1, 2)], ids=str)
def test_expected_is_what_uniform_choices_count(layout: Layout) -> None:
    tokens, experts = 20_000, 8
    generator = np.random.default_rng(0)
    ranked = generator.random((layout.group, 2, tokens, experts)).argsort(axis=-1)
    counted = counted_spread(ranked < K, layout)
    expected = expected_spread(experts, K, 2, tokens, layout)
    for name in ("pairs", "across", "within"):
        one, other = getattr(counted, name), getattr(expected, name)
        assert (one is None) == (other is None)
        for found, foreseen in zip(_numbers(one), _numbers(other), strict=True):
            assert found == pytest.approx(foreseen, rel=0.01)


def _numbers(of: object) -> list[float]:
    if of is None or isinstance(of, float):
        return [] if of is None else [of]
    return [number for value in vars(of).values() for number in _numbers(value)]
