"""The layer against the naive loop over (token, expert) pairs: values and all gradients, in fp64."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings

from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients
from tests.layer.cases import (
    Case,
    build_cotangents,
    build_ids,
    build_layer,
    build_tokens,
    cases,
    loss_of,
    loss_of_moe,
    naive_layer,
    naive_mixtures,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
@example(Case(tokens=0, num_gates=2, permutation="soft"))
@example(Case(tokens=0, gate="top_k", permutation="hard"))
@example(Case(tokens=1, hardness=1000.0, k=1, num_experts=17))
@example(Case(num_gates=3, num_experts=9, k=3, gamma=0.001, hardness=0.5, permutation="hard"))
@example(Case(num_gates=3, num_experts=5, k=2, gamma=0.001, hardness=0.5, permutation="soft"))
@example(Case(num_gates=2, num_experts=8, k=8, gate="top_k"))
@example(Case(num_gates=2, num_experts=5, k=2, permutation="soft", per_gate=True, per_branch=True))
@example(Case(num_gates=2, num_experts=6, k=3, hardness=1.0, permutation="hard", per_gate=True, per_branch=True))
@example(Case(num_gates=2, num_experts=6, k=3, hardness=1.0, permutation="through", per_gate=True, per_branch=True))
@example(Case(tokens=0, num_gates=2, permutation="through", per_branch=True))
@example(Case(num_gates=2, num_experts=3, num_slots=8, permutation="map", masked=True))
@example(Case(num_gates=2, num_experts=3, num_slots=8, permutation="map", per_gate=True, per_branch=True, masked=True))
@example(Case(gate="top_k", num_gates=2, num_experts=8, num_slots=3, permutation="map", per_gate=True))
@example(Case(gate="hash", num_gates=2, num_experts=3, num_slots=7, permutation="map", masked=True))
@example(Case(gate="dselect_k", num_experts=2, num_slots=8, permutation="map", per_branch=True, masked=True))
@example(Case(gate="dselect_k", tokens=0, num_experts=2, num_slots=8, permutation="map"))
def test_layer_equals_naive_loop(case: Case) -> None:
    layer, x_TD, cotangents = build_layer(case), build_tokens(case), build_cotangents(case)
    leaves = layer.leaves() | {"x": x_TD}

    output = layer.moe()(x_TD, build_ids(case))
    expected_outputs, expected_aux = naive_layer(layer, x_TD, build_ids(case))

    assert len(output.outputs) == case.num_gates
    for actual, expected in zip(output.outputs, expected_outputs, strict=True):
        assert actual.dtype == torch.float64
        assert_same(actual, expected)
    assert_all_same({name: loss.double() for name, loss in output.aux.items()}, expected_aux)
    expected_grads = naive_gradients(loss_of(expected_outputs, expected_aux, cotangents), leaves)
    assert_all_same(gradients(loss_of_moe(output, cotangents), leaves), expected_grads)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_mixture_is_a_distribution_and_route_holds_its_non_zeros(case: Case) -> None:
    layer, x_TD = build_layer(case), build_tokens(case)
    output = layer.moe()(x_TD, build_ids(case))
    expected_mixtures, _ = naive_mixtures(layer, x_TD, build_ids(case))
    wanted = torch.zeros(case.tokens, case.num_experts, dtype=torch.bool)
    for route, expected_TE in zip(output.routes, expected_mixtures, strict=True):
        dense_TE = route.dense()
        assert (route.weight_N > 0).all()
        if case.gate != "dselect_k":  # whose codes may be no slot's
            assert_same(dense_TE.sum(1), torch.ones(case.tokens, dtype=torch.float64), 1e-14)
        assert_same(dense_TE, expected_TE)
        assert torch.equal(dense_TE != 0, expected_TE.abs() > 1e-200)
        assert route.num_assignments == int((dense_TE != 0).sum())
        wanted |= expected_TE.abs() > 1e-200
    assert output.pairs.num_pairs == output.rows_computed == int(wanted.sum())
    assert torch.equal(output.pairs.rows_per_expert_E, wanted.sum(0))


def test_outputs_belong_to_their_gates() -> None:
    layer, x_TD = build_layer(Case(num_gates=2)), build_tokens(Case())
    both = layer.moe()(x_TD).outputs
    for gate, output in zip(layer.gates, both, strict=True):
        alone = type(layer)([gate], layer.experts, None).moe()(x_TD).outputs[0]
        assert torch.equal(output, alone)
    assert not torch.allclose(both[0], both[1])
