"""The layer with the two-level exchange: the fp64 oracle, the flat exchange, and what crosses nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import FlatExchange, OncePerPart, ProcessWorld, Traffic, World
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.helpers.pool import on_ranks
from tests.helpers.worlds import (
    RunOnRanks,
    both_kinds_in_nodes,
    emulated_in_nodes,
    in_nodes,
    processes_in_nodes,
    run_worlds,
)
from tests.layer.cases import Case, Layer, build_layer, build_tokens, naive_mixtures
from tests.layer.test_moe_ranks import RankResult, assert_equals_one_process, draw_split, run_case

LAYOUTS = [(2, 1), (4, 2), (4, 1), (8, 4), (8, 2)]
TOKENS = {
    2: [[3, 2], [0, 4], [0, 0]],
    4: [[2, 0, 1, 3], [0, 0, 0, 6], [0, 5, 0, 0]],
    8: [[1, 0, 2, 0, 0, 1, 3, 0], [0, 0, 0, 0, 0, 0, 0, 5]],
}
CASES = {
    "comet": Case(num_gates=2, hardness=0.6),
    "comet-hard-trees": Case(num_gates=3, k=3, hardness=1000.0, permutation="hard"),
    "comet-soft-permutation": Case(permutation="soft"),
    "comet-straight-through": Case(num_gates=2, permutation="through", per_branch=True),
    "top-k": Case(gate="top_k", num_gates=2, permutation="hard"),
}
ITEMSIZE = 8
InNodesOf = Callable[[int], RunOnRanks]


@both_kinds_in_nodes
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), LAYOUTS)
def test_equals_one_process(in_nodes_of: InNodesOf, name: str, num_ranks: int, ranks_per_node: int) -> None:
    for tokens_per_rank in TOKENS[num_ranks]:
        assert_equals_one_process(CASES[name], tokens_per_rank, in_nodes_of(ranks_per_node))


@both_kinds_in_nodes
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("num_gates", [1, 2])
def test_equals_the_flat_exchange_for_every_k(in_nodes_of: InNodesOf, k: int, num_gates: int) -> None:
    case = Case(gate="top_k", num_gates=num_gates, k=k)
    flat = run_case(case, [3, 0, 5, 2])
    two_level = run_case(case, [3, 0, 5, 2], run=in_nodes_of(2))
    for ours, theirs in zip(two_level, flat, strict=True):
        assert ours.output.rows_computed == theirs.output.rows_computed
        for actual, expected in zip(ours.output.outputs, theirs.output.outputs, strict=True):
            assert_same(actual, expected, 1e-13)
        assert_all_same(ours.grads, theirs.grads, 1e-13)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_split_equals_one_process(data: st.DataObject) -> None:
    num_nodes, ranks_per_node = data.draw(st.sampled_from([(2, 1), (2, 2), (3, 1), (3, 2), (2, 3)]))
    kind = data.draw(st.sampled_from([processes_in_nodes, emulated_in_nodes]))
    assert_equals_one_process(*draw_split(data, num_nodes * ranks_per_node), kind(ranks_per_node))


@both_kinds_in_nodes
@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_of_all_ranks_to_one_expert(in_nodes_of: InNodesOf, expert: int) -> None:
    case = Case(gate="top_k", k=1, tokens=9)
    layer = build_layer(case)
    with torch.no_grad():
        layer.gates[0].bias[expert] = 100.0
    flat = run_case(case, [4, 0, 3, 2], layer)
    two_level = run_case(case, [4, 0, 3, 2], layer, in_nodes_of(2))
    assert [r.output.rows_computed for r in two_level] == [9 if expert // 2 == rank else 0 for rank in range(4)]
    for ours, theirs in zip(two_level, flat, strict=True):
        assert_all_same(ours.grads, theirs.grads, 1e-13)


@both_kinds_in_nodes
def test_tokens_without_any_expert_get_zero(in_nodes_of: InNodesOf) -> None:
    """One gate wants two experts for every token, another nothing, as with null slots only."""
    case = Case(gate="top_k", num_gates=1, k=2)
    layer = build_layer(case)
    x_TD = build_tokens(replace(case, tokens=4))

    class Nothing(TopK):
        def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Any:
            nothing_N = torch.zeros(len(x_TD), dtype=torch.bool)
            return super().forward(x_TD, ids_T).keep(nothing_N.repeat_interleave(self.k))

    nothing = Nothing(case.dim, case.num_experts, 2).double()
    layers = [layer.of_rank(rank, 4) for rank in range(4)]

    def outputs(world: World) -> tuple[Tensor, ...]:
        moe = MoE([layers[world.rank].gates[0], nothing], layers[world.rank].experts, world=world)
        return moe(x_TD).outputs

    for some_TF, none_TF in in_nodes_of(2)(4, outputs):
        assert_same(some_TF, layer.moe()(x_TD).outputs[0], 1e-13)
        assert torch.equal(none_TF, torch.zeros_like(none_TF))


@both_kinds_in_nodes
@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "two_levels"), [(4, 2, True), (4, 1, True), (4, 4, False)])
def test_the_world_decides_which_exchange(
    in_nodes_of: InNodesOf, num_ranks: int, ranks_per_node: int, two_levels: bool
) -> None:
    def exchange(world: World) -> type:
        return type(build_layer(Case()).of_rank(world.rank, num_ranks).moe(world).exchange)

    expected = [OncePerPart if two_levels else FlatExchange] * num_ranks
    assert in_nodes_of(ranks_per_node)(num_ranks, exchange) == expected
    assert isinstance(build_layer(Case()).moe().exchange, FlatExchange)


def record_collectives(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Per thread, in ``log``: dtype, row shape and size of the group of every all-to-all."""
    local = threading.local()
    exchange = dist.all_to_all_single

    def recorded(output: Tensor, *arguments: Any, group: dist.ProcessGroup, **options: Any) -> Any:
        local.log.append((output.dtype, tuple(output.shape[1:]), dist.get_process_group_ranks(group)))
        return exchange(output, *arguments, group=group, **options)

    monkeypatch.setattr(dist, "all_to_all_single", recorded)
    return local


def logs_of(local: threading.local, tokens_per_rank: list[int], ranks_per_node: int, x_learns: bool) -> list[Any]:
    layer = build_layer(Case(num_gates=2))
    num_ranks = len(tokens_per_rank)
    layers = [layer.of_rank(rank, num_ranks) for rank in range(num_ranks)]
    tokens = [torch.randn(n, 3, dtype=torch.float64, requires_grad=x_learns) for n in tokens_per_rank]

    def log_of_rank(world: ProcessWorld) -> list[Any]:
        local.log = []
        outputs = layers[world.rank].moe(in_nodes(world, ranks_per_node))(tokens[world.rank]).outputs
        sum(y_TF.sum() for y_TF in outputs).backward()
        return local.log

    return run_worlds(num_ranks, log_of_rank)


@pytest.mark.parametrize("x_learns", [True, False])
def test_all_ranks_issue_the_same_collectives_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, x_learns: bool
) -> None:
    logs = logs_of(record_collectives(monkeypatch), [0, 7, 1, 0], 2, x_learns)
    kinds = [[(dtype, shape) for dtype, shape, _ in log] for log in logs]
    assert kinds == [kinds[0]] * 4
    counts, packed, sums = (torch.int64, (3,)), (torch.uint8, ()), (torch.float64, (4,))
    assert kinds[0] == [counts, packed] * 2 + [sums] * 2 + [sums] * 2 + [packed] * 2
    for rank, log in enumerate(logs):
        peers, neighbours = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        there = [peers, peers, neighbours, neighbours, neighbours, peers]
        assert [ranks for _, _, ranks in log] == [*there, peers, neighbours, neighbours, peers]


def test_one_node_issues_no_collective_across_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for log in logs_of(record_collectives(monkeypatch), [2, 0, 3, 1], 4, True):
        assert [ranks for _, _, ranks in log] == [[0, 1, 2, 3]] * 5


def naive_crossings(case: Case, layer: Layer, tokens_per_rank: list[int], per_node: int) -> list[dict[str, int]]:
    """Per rank and by loops over tokens, experts and gates: what must cross nodes, there and back."""
    mixtures, _ = naive_mixtures(layer, build_tokens(case))
    num_ranks = len(tokens_per_rank)
    names = [f"{what}_{side}" for what in ("rows", "pairs", "sums") for side in ("out", "in")]
    counts = [dict.fromkeys(names, 0) for _ in range(num_ranks)]
    experts_per_node = case.num_experts // (num_ranks // per_node)
    token = 0
    for rank, tokens in enumerate(tokens_per_rank):
        for _ in range(tokens):
            for node in range(num_ranks // per_node):
                if node == rank // per_node:
                    continue
                here = range(node * experts_per_node, (node + 1) * experts_per_node)
                pairs = sum(any(m[token, e] > 0 for m in mixtures) for e in here)
                sums = sum(any(m[token, e] > 0 for e in here) for m in mixtures)
                peer = node * per_node + rank % per_node
                for side, at in (("out", rank), ("in", peer)):
                    counts[at][f"rows_{side}"] += pairs > 0
                    counts[at][f"pairs_{side}"] += pairs
                    counts[at][f"sums_{side}"] += sums
            token += 1
    return counts


@both_kinds_in_nodes
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize("hardness", [0.1, 0.6, 1000.0])
def test_what_crosses_nodes_is_exactly_a_row_per_token_and_node(
    in_nodes_of: InNodesOf, num_ranks: int, ranks_per_node: int, hardness: float
) -> None:
    tokens_per_rank = [3, 0, 5, 2, 1, 0, 0, 4][:num_ranks]
    case = Case(num_gates=2, dim=3, hidden=5, hardness=hardness, tokens=sum(tokens_per_rank))
    layer = build_layer(case)
    results = run_case(case, tokens_per_rank, layer, in_nodes_of(ranks_per_node))
    naive = naive_crossings(case, layer, tokens_per_rank, ranks_per_node)
    assert sum(counts["rows_out"] for counts in naive) > 0
    row, pair, total = case.dim, case.num_gates, case.hidden
    for result, n in zip(results, naive, strict=True):
        forward_rows = n["rows_out"] + n["sums_in"]
        assert result.forward_traffic.rows_across_nodes == forward_rows
        key_bytes = 8 * n["pairs_out"]
        numbers = n["rows_out"] * row + n["pairs_out"] * pair + n["sums_in"] * total
        assert result.forward_traffic.bytes_across_nodes == ITEMSIZE * numbers + key_bytes
        numbers += n["rows_in"] * row + n["pairs_in"] * pair + n["sums_out"] * total
        assert result.traffic.rows_across_nodes == forward_rows + n["rows_in"] + n["sums_out"]
        assert result.traffic.bytes_across_nodes == ITEMSIZE * numbers + key_bytes


def across(results: list[RankResult]) -> tuple[int, int]:
    traffics: list[Traffic] = [result.traffic for result in results]
    return sum(t.rows_across_nodes for t in traffics), sum(t.bytes_across_nodes for t in traffics)


@both_kinds_in_nodes
def test_fewer_rows_cross_than_with_the_flat_exchange(in_nodes_of: InNodesOf, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokens_per_rank = Case(gate="top_k", k=8, dim=32, hidden=32, tokens=10), [3, 0, 5, 2]
    two_level = run_case(case, tokens_per_rank, run=in_nodes_of(2))
    monkeypatch.setattr("dist_moe.layer.moe.exchange_over", lambda world, *_, **__: FlatExchange(world))
    flat = run_case(case, tokens_per_rank, run=in_nodes_of(2))
    assert across(flat)[0] == 4 * across(two_level)[0] == 4 * 4 * 10
    assert across(two_level)[1] < across(flat)[1] / 3
    for result in (*flat, *two_level):
        assert result.traffic.rows > result.traffic.rows_across_nodes


@both_kinds_in_nodes
def test_sums_travel_in_the_precision_of_the_mixture(in_nodes_of: InNodesOf) -> None:
    """bf16 results, fp32 sums: as close to those of the flat exchange as fp32 is, not as bf16 is."""
    layer = build_layer(Case(gate="top_k", k=8))
    layers = [layer.of_rank(rank, 4) for rank in range(4)]
    for module in (m for each in layers for m in (*each.gates, each.experts)):
        module.float()
    x_TD = torch.randn(5, 3)

    def sums(world: World) -> list[Tensor]:
        moe = layers[world.rank].moe(world)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pairs = moe(x_TD).pairs
            mixed = [exchange(x_TD, pairs, moe.experts) for exchange in (FlatExchange(world), moe.exchange)]
        assert [m.dtype for m in mixed] == [torch.bfloat16] * 2
        return [m.sums_GTF for m in mixed]

    for flat_GTF, two_level_GTF in in_nodes_of(2)(4, sums):
        assert two_level_GTF.dtype == torch.float32
        torch.testing.assert_close(two_level_GTF, flat_GTF, rtol=1e-6, atol=1e-6)


def flat_and_two_level(case: Case, tokens_per_rank: list[int]) -> list[dict[str, Tensor]]:
    """Outputs and gradients of this process, by both exchanges."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    rank, layer = dist.get_rank(), build_layer(case)
    x_TD = build_tokens(case).detach().split(tokens_per_rank)[rank].requires_grad_()
    results = []
    try:
        for divide in (False, True):
            world = ProcessWorld(dist.group.WORLD)
            mine = layer.of_rank(rank, world.size)
            outputs = mine.moe(in_nodes(world, 2) if divide else world)(x_TD).outputs
            loss = sum(((g + 1) * y_TF.square()).sum() for g, y_TF in enumerate(outputs))
            results.append(gradients(loss, mine.leaves() | {"x": x_TD}) | {"out": torch.stack(outputs).detach()})
    finally:
        dist.destroy_process_group()
    return results


@pytest.mark.parametrize("tokens_per_rank", [[3, 0, 5, 2], [0, 0, 0, 10]])
def test_real_processes_equal_the_flat_exchange(tokens_per_rank: list[int]) -> None:
    case = Case(num_gates=2, hardness=0.6, tokens=10)
    for flat, two_level in on_ranks(4, flat_and_two_level, case, tokens_per_rank):
        assert_all_same(two_level, flat, 1e-12)
