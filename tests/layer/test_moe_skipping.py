"""Experts whose leaf mass is exactly 0 are skipped, forward and backward, without any effect."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Comet
from tests.gates.cases import leaf_mass
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.layer.cases import Case, Layer, build_cotangents, build_layer, build_tokens, loss_of_moe

HALF_SATURATED = Case(num_gates=2, num_experts=8, k=2, dim=4, hardness=1.2, tokens=40, seed=3)
GARBAGE = 1e3


def dense_loss(layer: Layer, x_TD: Tensor, cotangents: list[Tensor], garbage: bool) -> Tensor:
    """Every expert on every token, times a mixture that autograd differentiates at its zeros too.

    With ``garbage``, the results of (token, expert) pairs that no tree reaches are replaced.
    """
    y_TEF = torch.relu(torch.einsum("td,edf->tef", x_TD, layer.experts.weight) + layer.experts.bias)
    loss = x_TD.new_zeros(())
    for gate, cotangent_TF in zip(layer.gates, cotangents, strict=True):
        assert isinstance(gate, Comet)
        mass_TKE = leaf_mass(gate, x_TD)
        logit_TKE = torch.einsum("td,ked->tke", x_TD, gate.leaf_weight) + gate.leaf_bias
        share_TE = (mass_TKE * logit_TKE.exp()).sum(1)
        mixture_TE = share_TE / share_TE.sum(1, keepdim=True)
        reached_TE1 = (mass_TKE > 0).any(1).unsqueeze(-1)
        results_TEF = torch.where(reached_TE1, y_TEF, GARBAGE) if garbage else y_TEF
        loss = loss + ((mixture_TE.unsqueeze(-1) * results_TEF).sum(1) * cotangent_TF).sum()
        loss = loss + gate(x_TD).aux["entropy"]
    return loss


def test_case_reaches_from_two_to_eight_experts() -> None:
    layer, x_TD = build_layer(HALF_SATURATED), build_tokens(HALF_SATURATED)
    reached = torch.cat([(gate(x_TD).dense() > 0).sum(1) for gate in layer.gates])
    assert set(reached.tolist()) >= {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unreached_results_change_no_bit_of_loss_and_gradients(dtype: torch.dtype) -> None:
    layer = build_layer(HALF_SATURATED)
    for module in (*layer.gates, layer.experts):
        module.to(dtype)
    x_TD = build_tokens(HALF_SATURATED).detach().to(dtype).requires_grad_()
    cotangents = [c.to(dtype) for c in build_cotangents(HALF_SATURATED)]
    leaves = layer.leaves() | {"x": x_TD}
    honest, garbage = (dense_loss(layer, x_TD, cotangents, garbage) for garbage in (False, True))
    assert torch.equal(honest, garbage)
    expected = gradients(honest, leaves)
    for name, grad in gradients(garbage, leaves).items():
        assert torch.equal(grad, expected[name]), name


def test_dispatched_run_equals_dense_run_with_garbage() -> None:
    """To 1e-12, not to the bit: a matrix product over fewer rows may round differently."""
    layer, x_TD = build_layer(HALF_SATURATED), build_tokens(HALF_SATURATED)
    cotangents = build_cotangents(HALF_SATURATED)
    leaves = layer.leaves() | {"x": x_TD}
    output = layer.moe()(x_TD)
    assert 0 < output.rows_computed < 0.9 * x_TD.shape[0] * HALF_SATURATED.num_experts
    expected = dense_loss(layer, x_TD, cotangents, garbage=True)
    actual = loss_of_moe(output, cotangents)
    assert_same(actual, expected, 1e-12)
    assert_all_same(gradients(actual, leaves), gradients(expected, leaves), 1e-12)


@pytest.mark.parametrize("gate", ["comet", "top_k"])
@pytest.mark.parametrize("permutation", ["none", "hard", "through"])
def test_poisoned_unused_experts_change_no_bit(gate: str, permutation: str) -> None:
    """Weights of an expert that no token reaches may be NaN."""
    case = Case(gate=gate, k=1, hardness=1000.0, permutation=permutation, tokens=5, num_experts=16)
    layer, x_TD, cotangents = build_layer(case), build_tokens(case), build_cotangents(case)
    poisoned = deepcopy(layer)
    unused = layer.moe()(x_TD).pairs.rows_per_expert_E == 0
    assert unused.any()
    with torch.no_grad():
        poisoned.experts.weight[unused] = torch.nan
    outputs = [each.moe()(x_TD) for each in (layer, poisoned)]
    assert torch.equal(outputs[0].outputs[0], outputs[1].outputs[0])
    clean, dirty = (
        gradients(loss_of_moe(output, cotangents), each.leaves() | {"x": x_TD})
        for output, each in zip(outputs, (layer, poisoned), strict=True)
    )
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
