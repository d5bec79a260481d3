"""Layers whose gates choose among more or fewer slots than there are experts: the corners, and real ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.parallel import World
from dist_moe.search import SlotTable
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients
from tests.helpers.worlds import on_real_worlds
from tests.layer.cases import Case, build_cotangents, build_ids, build_layer, build_tokens, loss_of, naive_layer

GATES = ["comet", "top_k", "dselect_k", "hash"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("expert", [0, 2])
def test_all_slots_to_one_expert(gate: str, expert: int) -> None:
    """A token's pairs become one, with the whole weight; the other experts get none and no gradient."""
    case = Case(gate=gate, num_experts=3, num_slots=8, permutation="map", num_gates=2)
    layer, x_TD, ids_T = build_layer(case), build_tokens(case), build_ids(case)
    assert layer.search is not None
    layer.search.table.fill_(expert)
    output = layer.moe()(x_TD, ids_T)
    assert output.pairs.rows_per_expert_E.tolist() == [case.tokens if e == expert else 0 for e in range(3)]
    assert [route.tokens_per_slot.tolist() for route in output.routes] == [output.pairs.rows_per_expert_E.tolist()] * 2
    assert_same(output.pairs.weight_GN, torch.ones(2, case.tokens, dtype=torch.float64), 1e-14)
    leaves, cotangents = layer.leaves() | {"x": x_TD}, build_cotangents(case)
    expected = naive_gradients(loss_of(*naive_layer(layer, x_TD, ids_T), cotangents), leaves)
    assert_all_same(gradients(loss_of(list(output.outputs), output.aux, cotangents), leaves), expected)


@pytest.mark.parametrize("gate", GATES)
def test_experts_without_slots_get_no_token(gate: str) -> None:
    case = Case(gate=gate, num_experts=8, num_slots=3, permutation="map", hidden=2)
    layer = build_layer(case)
    assert layer.search is not None
    layer.search.table[0, 0] = torch.tensor([6, 1, 6])
    output = layer.moe()(build_tokens(case), build_ids(case))
    assert set(output.pairs.expert_N.tolist()) <= {1, 6}
    assert output.routes[0].num_slots == len(output.pairs.rows_per_expert_E) == 8
    output.outputs[0].sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[[0, 2, 3, 4, 5, 7]].any()


@pytest.mark.parametrize("gate", GATES)
def test_the_identity_has_every_bit_of_a_layer_without_a_map(gate: str) -> None:
    case = Case(gate=gate, num_gates=2)
    layer = build_layer(case)
    mapped = replace(layer, search=SlotTable(case.num_experts, case.num_gates))
    results = []
    for each in (layer, mapped):
        x_TD = build_tokens(case)
        output = each.moe()(x_TD, build_ids(case))
        grads = naive_gradients(loss_of(list(output.outputs), output.aux, build_cotangents(case)), each.leaves())
        results.append([*output.outputs, output.pairs.weight_GN, *grads.values()])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def run_on_rank(world: World, case: Case, tokens_per_rank: list[int]) -> dict[str, NDArray[np.float64]]:
    """Outputs and gradients of this rank's share of the tokens and of the loss."""
    rank, share = world.rank, tokens_per_rank[world.rank] / case.tokens
    layer = build_layer(case).of_rank(rank, world.size)
    x_TD = build_tokens(case).detach().split(tokens_per_rank)[rank].clone().requires_grad_()
    output = layer.moe(world)(x_TD, build_ids(case).split(tokens_per_rank)[rank])
    cotangents = [c.split(tokens_per_rank)[rank] for c in build_cotangents(case)]
    aux = {name: share * loss for name, loss in output.aux.items()}
    grads = gradients(loss_of(list(output.outputs), aux, cotangents), layer.leaves() | {"x": x_TD})
    outputs = {f"output{g}": y_TF.detach() for g, y_TF in enumerate(output.outputs)}
    return {name: tensor.numpy() for name, tensor in (outputs | grads).items()}


@pytest.mark.parametrize("tokens_per_rank", [[4, 3], [0, 5]])
def test_two_real_ranks_equal_the_naive_loop(tokens_per_rank: list[int]) -> None:
    case = Case(
        num_experts=4, num_slots=9, k=3, num_gates=2, permutation="map", per_gate=True, per_branch=True, masked=True
    )
    case = replace(case, tokens=sum(tokens_per_rank))
    layer, x_TD, ids_T = build_layer(case), build_tokens(case), build_ids(case)
    outputs, aux = naive_layer(layer, x_TD, ids_T)
    leaves = layer.leaves() | {"x": x_TD}
    expected = naive_gradients(loss_of(outputs, aux, build_cotangents(case)), leaves)
    expected |= {f"output{g}": y_TF for g, y_TF in enumerate(outputs)}
    ranks = on_real_worlds(2, run_on_rank, case, tokens_per_rank)
    for name, tensor in expected.items():
        parts = [torch.from_numpy(rank[name]) for rank in ranks]
        split_up = name == "x" or name.startswith(("output", "experts."))
        assert_same(torch.cat(parts) if split_up else parts[0] + parts[1], tensor, name=name)
