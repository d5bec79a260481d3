"""Experts that live anywhere: the outputs and gradients of one process, whatever the placement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dist_moe.layer import DenseReplay, MoEOutput
from dist_moe.parallel import Placement, ProcessWorld
from dist_moe.routing import union_of_routes
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients
from tests.helpers.worlds import run_worlds
from tests.layer.cases import Case, Layer, build_cotangents, build_layer, build_tokens, loss_of, naive_layer

CASES = {
    "comet": Case(num_gates=2, permutation="hard"),
    "comet-straight-through": Case(permutation="through", per_branch=True),
    "top-k": Case(gate="top_k", num_gates=2),
}
TOKENS = {1: [[5], [0]], 2: [[3, 2], [0, 4], [0, 0]], 4: [[2, 0, 1, 3], [0, 0, 0, 6]]}


def some_placement(num_ranks: int, seed: int, num_experts: int = 8) -> Placement:
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)).tolist()
    return Placement(tuple(order), num_ranks)


def run_placed(
    case: Case, tokens_per_rank: list[int], placement: Placement, layer: Layer
) -> list[tuple[MoEOutput, dict[str, Tensor]]]:
    """Each rank's output and gradients, each with its own slice of the tokens and its share of the loss."""
    num_ranks = len(tokens_per_rank)
    tokens = [x.requires_grad_() for x in build_tokens(case).detach().split(tokens_per_rank)]
    cotangents = [
        list(parts) for parts in zip(*(c.split(tokens_per_rank) for c in build_cotangents(case)), strict=True)
    ]
    layers = [layer.of_rank(rank, num_ranks, placement) for rank in range(num_ranks)]

    def run_rank(world: ProcessWorld) -> tuple[MoEOutput, dict[str, Tensor]]:
        mine, x_TD = layers[world.rank], tokens[world.rank]
        output = mine.moe(world, placement)(x_TD)
        shares = {"entropy": len(x_TD) / max(case.tokens, 1), "permutation": 1 / num_ranks}
        aux = {name: loss * shares[name] for name, loss in output.aux.items()}
        return output, gradients(
            loss_of(list(output.outputs), aux, cotangents[world.rank]), mine.leaves() | {"x": x_TD}
        )

    return run_worlds(num_ranks, run_rank)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("num_ranks", "tokens_per_rank"), [(num_ranks, split) for num_ranks, splits in TOKENS.items() for split in splits]
)
def test_every_placement_equals_one_process(name: str, num_ranks: int, tokens_per_rank: list[int], seed: int) -> None:
    case = replace(CASES[name], tokens=sum(tokens_per_rank))
    placement = some_placement(num_ranks, seed)
    assert not placement.is_identity
    layer, x_TD = build_layer(case), build_tokens(case)
    outputs, aux = naive_layer(layer, x_TD)
    leaves = layer.leaves() | {"x": x_TD}
    expected = naive_gradients(loss_of(outputs, aux, build_cotangents(case)), leaves)

    results = run_placed(case, tokens_per_rank, placement, layer)
    for g, output in enumerate(outputs):
        assert_same(torch.cat([result.outputs[g] for result, _ in results]), output)
    actual = {}
    for key in expected:
        parts = [grads[key] for _, grads in results]
        joined = torch.cat(parts) if key == "x" or key.startswith("experts.") else torch.stack(parts).sum(0)
        actual[key] = joined[list(placement.position_of_expert)] if key.startswith("experts.") else joined
    assert_all_same(actual, expected)


def test_pairs_bear_the_ids_of_experts_in_the_order_of_their_positions() -> None:
    case, placement = Case(num_gates=2, tokens=6), some_placement(2, seed=1)
    layer = build_layer(case)
    expected = union_of_routes([gate(build_tokens(case)) for gate in layer.gates])
    outputs = [output for output, _ in run_placed(case, [6, 0], placement, layer)]
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
    results = run_placed(case, tokens_per_rank, placement, layer)
    assert [output.rows_computed for output, _ in results] == [9, 0, 0, 0]
    expected = naive_gradients(loss_of(*naive_layer(layer, build_tokens(case)), build_cotangents(case)), layer.leaves())
    weight_grad = torch.cat([grads["experts.weight"] for _, grads in results])
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
