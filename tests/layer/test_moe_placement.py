"""Experts that live anywhere: the outputs and gradients of one process, whatever the placement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dist_moe.layer import DenseReplay
from dist_moe.parallel import Placement
from dist_moe.routing import union_of_routes
from tests.helpers.oracle import assert_same, naive_gradients
from tests.helpers.worlds import run_worlds
from tests.layer.cases import Case, build_cotangents, build_layer, build_tokens, loss_of, naive_layer
from tests.layer.test_moe_ranks import assert_equals_one_process, run_case

CASES = {
    "comet": Case(num_gates=2, permutation="hard"),
    "comet-straight-through": Case(permutation="through", per_branch=True),
    "top-k": Case(gate="top_k", num_gates=2),
}
TOKENS = {1: [[5], [0]], 2: [[3, 2], [0, 4], [0, 0]], 4: [[2, 0, 1, 3], [0, 0, 0, 6]]}


def some_placement(num_ranks: int, seed: int, num_experts: int = 8) -> Placement:
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)).tolist()
    return Placement(tuple(order), num_ranks)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("num_ranks", "tokens_per_rank"), [(num_ranks, split) for num_ranks, splits in TOKENS.items() for split in splits]
)
def test_every_placement_equals_one_process(name: str, num_ranks: int, tokens_per_rank: list[int], seed: int) -> None:
    case = replace(CASES[name], tokens=sum(tokens_per_rank))
    placement = some_placement(num_ranks, seed)
    assert not placement.is_identity
    assert_equals_one_process(case, tokens_per_rank, run_worlds, placement)


def test_pairs_bear_the_ids_of_experts_in_the_order_of_their_positions() -> None:
    case, placement = Case(num_gates=2, tokens=6), some_placement(2, seed=1)
    layer = build_layer(case)
    expected = union_of_routes([gate(build_tokens(case)) for gate in layer.gates])
    outputs = [result.output for result in run_case(case, [6, 0], layer, run_worlds, placement)]
    pairs = outputs[0].pairs
    assert torch.equal(pairs.rows_per_expert_E, expected.rows_per_expert_E)
    keys = list(zip(pairs.expert_N.tolist(), pairs.token_N.tolist(), strict=True))
    assert keys == sorted(keys, key=lambda key: (placement.position_of_expert[key[0]], key[1]))
    assert sorted(keys) == list(zip(expected.expert_N.tolist(), expected.token_N.tolist(), strict=True))
    rows_E = expected.rows_per_expert_E
    for rank, output in enumerate(outputs):
        assert output.rows_computed == rows_E[list(placement.experts_of(rank))].sum()


def test_one_hot_expert_is_computed_where_it_lives() -> None:
    case, tokens_per_rank = Case(gate="top_k", k=1, tokens=9), [4, 0, 3, 2]
    placement = Placement((7, 5, 0, 1, 2, 6, 3, 4), 4)
    layer = build_layer(case)
    with torch.no_grad():
        layer.gates[0].bias[5] = 100.0
    results = run_case(case, tokens_per_rank, layer, run_worlds, placement)
    assert [result.output.rows_computed for result in results] == [9, 0, 0, 0]
    expected = naive_gradients(loss_of(*naive_layer(layer, build_tokens(case)), build_cotangents(case)), layer.leaves())
    weight_grad = torch.cat([result.grads["experts.weight"] for result in results])
    assert_same(weight_grad[list(placement.position_of_expert)], expected["experts.weight"])


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_every_expert_makes_of_every_token_is_told_by_id(num_ranks: int) -> None:
    """On this, swap search builds."""
    case, placement = Case(tokens=3 * num_ranks), some_placement(num_ranks, seed=3)
    layer, x_TD = build_layer(case), build_tokens(case).detach()
    expected_TEF = layer.moe().all_results(x_TD)
    parts, layers = x_TD.split(3), [layer.of_rank(rank, num_ranks, placement) for rank in range(num_ranks)]
    results = run_worlds(
        num_ranks, lambda world: layers[world.rank].moe(world, placement).all_results(parts[world.rank])
    )
    assert_same(torch.cat(results), expected_TEF)


def test_the_dense_layer_knows_where_experts_are() -> None:
    case, placement = Case(tokens=5), some_placement(1, seed=4)
    layer, x_TD = build_layer(case), build_tokens(case)
    moe = layer.of_rank(0, 1, placement).moe(placement=placement)
    with moe.replayed_by(DenseReplay([torch.eye(8, dtype=torch.float64).unsqueeze(0)])):
        assert_same(moe(x_TD).outputs[0], layer.moe()(x_TD).outputs[0])


def test_a_placement_that_does_not_fit_is_refused() -> None:
    layer = build_layer(Case())
    with pytest.raises(ValueError, match=r"a placement of 8 experts on 2 rank\(s\) does not fit 8 experts on 1"):
        layer.moe(placement=Placement.identity(8, 2))
    with pytest.raises(ValueError, match="a placement of 4 experts"):
        layer.moe().place(Placement.identity(4, 1))
    with pytest.raises(ValueError, match=r"must hold the experts \(1, 0, 2"):
        layer.moe(placement=Placement((1, 0, 2, 3, 4, 5, 6, 7), 1))
