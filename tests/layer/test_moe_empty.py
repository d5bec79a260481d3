"""No tokens, no rows for an expert, all rows for one expert: right, finite, and never a missing gradient."""

from __future__ import annotations

import pytest
import torch

from dist_moe.gates import Comet, TopK
from tests.helpers.oracle import assert_all_same, gradients, naive_gradients
from tests.layer.cases import (
    Case,
    Layer,
    build_cotangents,
    build_layer,
    build_tokens,
    loss_of,
    loss_of_moe,
    naive_layer,
)

GATES = ["comet", "top_k"]
PERMUTATIONS = ["none", "hard", "soft", "through"]


def send_all_to_expert(layer: Layer, expert: int) -> None:
    """Bias alone decides: the leftmost leaf for COMET, so ``expert`` must be 0 there."""
    with torch.no_grad():
        for gate in layer.gates:
            if isinstance(gate, Comet):
                assert expert == 0
                gate.split_weight.zero_()
                gate.split_bias.fill_(gate.gamma)
            elif isinstance(gate, TopK):
                gate.bias[expert] = 100.0


def check_against_naive(case: Case, layer: Layer) -> None:
    x_TD, cotangents = build_tokens(case), build_cotangents(case)
    leaves = layer.leaves() | {"x": x_TD}
    expected = naive_gradients(loss_of(*naive_layer(layer, x_TD), cotangents), leaves)
    actual = gradients(loss_of_moe(layer.moe()(x_TD), cotangents), leaves)
    assert all(grad.isfinite().all() for grad in actual.values())
    assert_all_same(actual, expected)


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize("gate", GATES)
def test_without_tokens_every_gradient_is_zero_not_none(gate: str, permutation: str) -> None:
    case = Case(gate=gate, num_gates=2, permutation=permutation, tokens=0)
    layer, x_TD = build_layer(case), build_tokens(case)
    output = layer.moe()(x_TD)
    assert [y.shape for y in output.outputs] == [(0, case.hidden)] * 2
    assert output.rows_computed == 0
    assert all(loss.isfinite() for loss in output.aux.values())
    (loss_of_moe(output, build_cotangents(case)) - output.aux.get("permutation", 0)).backward()
    for name, leaf in layer.leaves().items():
        if name == "relaxed" and permutation == "hard":
            continue
        assert leaf.grad is not None, name
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("gate", GATES)
def test_experts_without_rows_get_zero_gradients_not_none(gate: str) -> None:
    case = Case(gate=gate, k=1, num_experts=16, hardness=1000.0, tokens=5)
    layer, x_TD = build_layer(case), build_tokens(case)
    output = layer.moe()(x_TD)
    idle = output.pairs.rows_per_expert_E == 0
    assert idle.sum() >= 11
    output.outputs[0].sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[idle] == 0).all()
        assert (parameter.grad[~idle] != 0).any()
    check_against_naive(case, layer)


@pytest.mark.parametrize("permutation", PERMUTATIONS)
@pytest.mark.parametrize("gate", GATES)
def test_all_tokens_to_one_expert(gate: str, permutation: str) -> None:
    case = Case(gate=gate, num_gates=2, k=1, permutation=permutation, tokens=6)
    layer = build_layer(case)
    send_all_to_expert(layer, 0)
    if permutation != "soft":
        rows_E = layer.moe()(build_tokens(case)).pairs.rows_per_expert_E
        expert = 0 if layer.search is None else int(layer.search.table[0, 0, 0])
        assert rows_E.tolist() == [6 if e == expert else 0 for e in range(case.num_experts)]
    check_against_naive(case, layer)


def test_tiny_leaf_masses_in_fp32_are_never_nan() -> None:
    """Deep leaves just inside the edge of every split: masses below the smallest normal number."""
    torch.manual_seed(0)
    gate = Comet(dim=1, num_experts=16, k=2, gamma=1.0)
    with torch.no_grad():
        gate.split_weight.fill_(1.0)
        gate.split_bias.zero_()
    edge = torch.tensor(-0.5)
    x_TD = torch.stack([edge + 2.0**-exponent for exponent in range(1, 26)]).unsqueeze(1).requires_grad_()
    route = gate(x_TD)
    (route.dense() * torch.randn(25, 16)).sum().backward()
    tensors = [route.dense(), x_TD.grad, *(p.grad for p in gate.parameters())]
    assert all(tensor is not None and tensor.isfinite().all() for tensor in tensors)
    torch.testing.assert_close(route.dense().sum(1), torch.ones(25))
