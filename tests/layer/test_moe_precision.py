"""Under autocast the experts may compute in bf16; the mixture is fp32, permuted or not."""

from __future__ import annotations

import pytest
import torch

from tests.layer.cases import Case, Layer, build_layer, build_tokens


def layer_in_fp32(case: Case) -> Layer:
    layer = build_layer(case)
    for module in (*layer.gates, layer.experts, layer.search):
        if module is not None:
            module.float()
    return layer


@pytest.mark.parametrize("permutation", ["none", "hard", "soft", "through"])
@pytest.mark.parametrize("gate", ["comet", "top_k"])
def test_mixture_and_auxiliary_losses_are_those_without_autocast(gate: str, permutation: str) -> None:
    case = Case(gate=gate, num_gates=2, permutation=permutation, tokens=20)
    layer, x_TD = layer_in_fp32(case), build_tokens(case).detach().float()
    expected = layer.moe()(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer.moe()(x_TD)
    for name, loss in expected.aux.items():
        assert output.aux[name].dtype == torch.float32
        assert torch.equal(output.aux[name], loss), name
    for route, expected_route in zip(output.routes, expected.routes, strict=True):
        assert route.weight_N.dtype == torch.float32
        assert torch.equal(route.dense(), expected_route.dense())


def test_outputs_under_autocast_are_close_to_those_without() -> None:
    case = Case(num_gates=2, tokens=20)
    layer, x_TD = layer_in_fp32(case), build_tokens(case).detach().float()
    expected = layer.moe()(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer.moe()(x_TD)
    for actual_TF, expected_TF in zip(output.outputs, expected.outputs, strict=True):
        assert actual_TF.dtype == torch.bfloat16
        torch.testing.assert_close(actual_TF.float(), expected_TF, rtol=0, atol=0.02 * expected_TF.abs().max().item())


def test_weighted_sum_is_accumulated_in_the_precision_of_the_mixture() -> None:
    """A token's 300 equal results times 1/300 give that result again, which bf16 sums do not."""
    case = Case(gate="top_k", num_experts=300, k=300, dim=2, hidden=2, tokens=3)
    layer, x_TD = layer_in_fp32(case), build_tokens(case).detach().float()
    with torch.no_grad():
        layer.gates[0].weight.zero_()
        layer.gates[0].bias.zero_()
        layer.experts.weight.zero_()
        layer.experts.bias.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer.moe()(x_TD)
    assert torch.equal(output.outputs[0], torch.ones(3, 2, dtype=torch.bfloat16))
