"""The layer with its experts split over ranks: the outputs and gradients of one process, whatever the split."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.layer import MoEOutput
from dist_moe.parallel import EmulatedWorld, Placement, Traffic, World
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients
from tests.helpers.worlds import run_worlds
from tests.layer.cases import (
    PERMUTATION_WEIGHT,
    Case,
    Layer,
    build_cotangents,
    build_ids,
    build_layer,
    build_tokens,
    loss_of,
    naive_layer,
    naive_mixtures,
)


@dataclass(frozen=True)
class RankResult:
    output: MoEOutput
    grads: dict[str, Tensor]
    forward_traffic: Traffic
    traffic: Traffic


Run = Callable[[int, Callable[[World], RankResult]], list[RankResult]]
"""``run(num_ranks, function)`` on ranks of some kind, divided into nodes, for instance."""


def emulated(num_ranks: int, function: Callable[[World], RankResult]) -> list[RankResult]:
    return EmulatedWorld(num_ranks).run(function)


def run_case(
    case: Case,
    tokens_per_rank: list[int],
    layer: Layer | None = None,
    run: Run = emulated,
    placement: Placement | None = None,
) -> list[RankResult]:
    """Forward and backward on every rank, each with its own slice of the tokens and its share of the loss."""
    case = replace(case, tokens=sum(tokens_per_rank))
    layer = layer or build_layer(case)
    num_ranks = len(tokens_per_rank)
    tokens = [x.requires_grad_() for x in build_tokens(case).detach().split(tokens_per_rank)]
    cotangents = [
        list(parts) for parts in zip(*(c.split(tokens_per_rank) for c in build_cotangents(case)), strict=True)
    ]
    ids = build_ids(case).split(tokens_per_rank)
    layers = [layer.of_rank(rank, num_ranks, placement) for rank in range(num_ranks)]

    def run_rank(world: World) -> RankResult:
        rank, x_TD = world.rank, tokens[world.rank]
        output = layers[rank].moe(world, placement)(x_TD, ids[rank])
        forward_traffic = replace(world.traffic)
        share = len(x_TD) / max(case.tokens, 1)
        shares = {"entropy": share, "reciprocal": share, "permutation": 1 / num_ranks}
        aux = {name: loss * shares[name] for name, loss in output.aux.items()}
        loss = loss_of(list(output.outputs), aux, cotangents[rank])
        grads = gradients(loss, layers[rank].leaves() | {"x": x_TD})
        return RankResult(output, grads, forward_traffic, world.traffic)

    return run(num_ranks, run_rank)


def assert_equals_one_process(
    case: Case, tokens_per_rank: list[int], run: Run = emulated, placement: Placement | None = None
) -> None:
    case = replace(case, tokens=sum(tokens_per_rank))
    layer, x_TD = build_layer(case), build_tokens(case)
    outputs, aux = naive_layer(layer, x_TD, build_ids(case))
    leaves = layer.leaves() | {"x": x_TD}
    expected = naive_gradients(loss_of(outputs, aux, build_cotangents(case)), leaves)

    results = run_case(case, tokens_per_rank, run=run, placement=placement)
    for g, output in enumerate(outputs):
        assert_same(torch.cat([result.output.outputs[g] for result in results]), output)
    split_up = {name for name in expected if name == "x" or name.startswith("experts.")}
    actual = {
        name: torch.cat([result.grads[name] for result in results])
        if name in split_up
        else sum((result.grads[name] for result in results), torch.zeros_like(leaves[name]))
        for name in expected
    }
    for name in actual:
        if placement is not None and name.startswith("experts."):
            actual[name] = actual[name][list(placement.position_of_expert)]
    assert_all_same(actual, expected)


RAGGED = [
    (2, [3, 2]),
    (2, [0, 4]),
    (2, [5, 0]),
    (2, [0, 0]),
    (3, [1, 0, 4]),
    (3, [0, 5, 0]),
    (4, [2, 0, 1, 3]),
    (4, [0, 0, 0, 6]),
    (8, [1, 0, 2, 0, 0, 1, 3, 0]),
    (8, [0, 0, 0, 0, 0, 0, 0, 5]),
]
CASES = {
    "comet": Case(num_gates=2, hardness=0.6),
    "comet-hard-trees": Case(num_gates=2, k=3, hardness=1000.0, permutation="hard"),
    "comet-soft-permutation": Case(permutation="soft"),
    "comet-tables-per-gate-and-tree": Case(num_gates=2, permutation="hard", per_gate=True, per_branch=True),
    "comet-straight-through": Case(num_gates=2, permutation="through", per_branch=True),
    "top-k": Case(gate="top_k", num_gates=2, permutation="hard"),
    "recomputed": Case(num_gates=2, hardness=1000.0, recompute=True),
    "comet-many-to-one": Case(num_gates=2, permutation="map", num_slots=13, masked=True),
    "comet-maps-per-gate-and-tree": Case(
        num_gates=2, permutation="map", num_slots=5, per_gate=True, per_branch=True, masked=True
    ),
    "top-k-many-to-one": Case(gate="top_k", num_gates=2, k=3, permutation="map", num_slots=13, per_gate=True),
    "dselect-k-many-to-one": Case(gate="dselect_k", permutation="map", num_slots=16, per_branch=True, masked=True),
    "hash-many-to-one": Case(gate="hash", num_gates=2, permutation="map", num_slots=20, per_gate=True, masked=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("num_ranks", "tokens_per_rank"), RAGGED)
def test_ragged_ranks_equal_one_process(name: str, num_ranks: int, tokens_per_rank: list[int]) -> None:
    case = replace(CASES[name], num_experts=6 if num_ranks == 3 else 8)
    assert_equals_one_process(case, tokens_per_rank)


@pytest.mark.parametrize(("num_ranks", "name"), [(16, "comet"), (16, "top-k"), (64, "top-k")])
def test_many_ranks_equal_one_process(num_ranks: int, name: str) -> None:
    tokens_per_rank = [max(0, 3 - rank % 8) for rank in range(16)] + [0] * (num_ranks - 16)
    assert_equals_one_process(replace(CASES[name], num_experts=num_ranks), tokens_per_rank[::-1])


def draw_split(data: st.DataObject, num_ranks: int) -> tuple[Case, list[int]]:
    num_experts = data.draw(st.integers(2 if num_ranks == 1 else 1, 3)) * num_ranks
    case = Case(
        gate=data.draw(st.sampled_from(["comet", "top_k"])),
        num_gates=data.draw(st.integers(1, 3)),
        num_experts=num_experts,
        k=data.draw(st.integers(1, min(num_experts, 4))),
        hardness=data.draw(st.sampled_from([0.5, 1.0, 1000.0])),
        permutation=data.draw(st.sampled_from(["none", "hard", "soft", "through"])),
        per_gate=data.draw(st.booleans()),
        per_branch=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    return case, data.draw(st.lists(st.integers(0, 4), min_size=num_ranks, max_size=num_ranks))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_split_equals_one_process(data: st.DataObject) -> None:
    assert_equals_one_process(*draw_split(data, data.draw(st.integers(1, 5))))


def test_all_tokens_of_all_ranks_to_one_expert() -> None:
    case, tokens_per_rank = Case(gate="top_k", k=1, tokens=9), [4, 0, 3, 2]
    layer = build_layer(case)
    with torch.no_grad():
        layer.gates[0].bias[5] = 100.0
    results = run_case(case, tokens_per_rank, layer)
    assert [result.output.rows_computed for result in results] == [0, 0, 9, 0]
    leaves = layer.leaves()
    x_TD = build_tokens(case)
    expected = naive_gradients(loss_of(*naive_layer(layer, x_TD), build_cotangents(case)), leaves)
    weight_grad = torch.cat([result.grads["experts.weight"] for result in results])
    assert_same(weight_grad, expected["experts.weight"])


def test_all_ranks_issue_the_same_collectives_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    exchange = dist.all_to_all_single

    def recorded(output: Tensor, *arguments: Any, **options: Any) -> Any:
        local.log.append((output.dtype, tuple(output.shape[1:])))
        return exchange(output, *arguments, **options)

    monkeypatch.setattr(dist, "all_to_all_single", recorded)
    layer, cotangent = build_layer(Case()), torch.ones(4, dtype=torch.float64)
    layers = [layer.of_rank(rank, 4) for rank in range(4)]
    tokens = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (0, 7, 1, 0)]

    def log_of_rank(world: World) -> list[Any]:
        local.log = []
        (layers[world.rank].moe(world)(tokens[world.rank]).outputs[0] @ cotangent).sum().backward()
        return local.log

    logs = run_worlds(4, log_of_rank)
    assert logs == [logs[0]] * 4
    counts, dispatched, combined, combine_back, dispatch_back = logs[0]
    assert counts[0] == torch.int64
    assert dispatched == dispatch_back == (torch.float64, (3,))
    assert combined == combine_back == (torch.float64, (4,))


def expected_traffic(case: Case, layer: Layer, tokens_per_rank: list[int]) -> list[tuple[int, int]]:
    """Per rank: (pairs whose expert lives elsewhere, pairs of other ranks whose expert lives here)."""
    mixtures, _ = naive_mixtures(layer, build_tokens(case))
    wanted_TE = torch.stack([mixture > 0 for mixture in mixtures]).any(0)
    num_ranks = len(tokens_per_rank)
    rank_of_token_T = torch.arange(num_ranks).repeat_interleave(torch.tensor(tokens_per_rank))
    sent = [[0] * num_ranks for _ in range(num_ranks)]
    for token, expert in wanted_TE.nonzero().tolist():
        sent[int(rank_of_token_T[token])][expert * num_ranks // case.num_experts] += 1
    away = [sum(sent[r]) - sent[r][r] for r in range(num_ranks)]
    arrived = [sum(row[r] for row in sent) - sent[r][r] for r in range(num_ranks)]
    return list(zip(away, arrived, strict=True))


@pytest.mark.parametrize("hardness", [0.1, 0.6, 1000.0])
def test_traffic_is_exactly_the_pairs_that_leave_their_rank(hardness: float) -> None:
    tokens_per_rank = [3, 0, 5, 2]
    case = Case(num_gates=2, dim=3, hidden=5, hardness=hardness, tokens=10)
    layer = build_layer(case)
    results = run_case(case, tokens_per_rank, layer)
    pairs = expected_traffic(case, layer, tokens_per_rank)
    itemsize = 8
    for result, (away, arrived) in zip(results, pairs, strict=True):
        assert result.forward_traffic.rows == away + arrived
        assert result.forward_traffic.bytes == itemsize * (away * case.dim + arrived * case.hidden)
        assert result.traffic.rows == 2 * (away + arrived)
        assert result.traffic.bytes == itemsize * (away + arrived) * (case.dim + case.hidden)
    total_away = sum(away for away, _ in pairs)
    assert total_away > 0
    assert sum(result.traffic.rows for result in results) == 4 * total_away


def test_rows_computed_over_all_ranks_is_the_number_of_distinct_pairs() -> None:
    tokens_per_rank = [3, 0, 5, 2]
    case = Case(num_gates=3, hardness=0.8, tokens=10)
    layer = build_layer(case)
    mixtures, _ = naive_mixtures(layer, build_tokens(case))
    wanted_TE = torch.stack([mixture > 0 for mixture in mixtures]).any(0)
    assert wanted_TE.sum() < sum(int((mixture > 0).sum()) for mixture in mixtures)
    results = run_case(case, tokens_per_rank, layer)
    assert sum(result.output.rows_computed for result in results) == int(wanted_TE.sum())
    per_rank = wanted_TE.sum(0).view(4, 2).sum(1)
    assert [result.output.rows_computed for result in results] == per_rank.tolist()


def test_hardening_the_splits_reduces_traffic_and_rows() -> None:
    tokens_per_rank, case = [3, 4, 5, 2], Case(hardness=0.3, tokens=14)
    layer = build_layer(case)
    totals = []
    for _ in range(3):
        results = run_case(case, tokens_per_rank, layer)
        totals.append((sum(r.traffic.rows for r in results), sum(r.output.rows_computed for r in results)))
        with torch.no_grad():
            for parameter in (layer.gates[0].split_weight, layer.gates[0].split_bias):
                parameter.mul_(6)
    for softer, harder in pairwise(totals):
        assert harder[0] < softer[0]
        assert harder[1] < softer[1]
    assert totals[-1][1] <= case.k * case.tokens


def test_pair_wanted_by_several_gates_travels_once() -> None:
    one = run_case(Case(), [3, 5])
    layer = build_layer(Case())
    twins = Layer(layer.gates * 3, layer.experts, None)
    three = run_case(Case(num_gates=3), [3, 5], twins)
    assert [r.traffic for r in three] == [r.traffic for r in one]
    assert [r.output.rows_computed for r in three] == [r.output.rows_computed for r in one]


def test_relaxed_permutation_weight_counts_once() -> None:
    """The split of the penalty over ranks that the other tests assume."""
    results = run_case(Case(permutation="soft"), [2, 2])
    first, second = (result.output.aux["permutation"] for result in results)
    assert PERMUTATION_WEIGHT > 0
    assert torch.equal(first, second)
