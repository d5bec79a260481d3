"""Gates compute in fp32 under any autocast and for any input below fp64, which stays fp64."""

from __future__ import annotations

import pytest
import torch

from dist_moe.gates import Gate
from dist_moe.routing import Route
from tests.gates.cases import DIM, UNSATURATED, build

TOKENS = 24
IDS_T = torch.arange(TOKENS) % 5
TRAINED = ["comet_balance", "comet_lazy", "top_k_losses", "top_k_sigmoid", "dselect_k", "softmax", "relu", "ada_moe"]
VARIANTS = [*TRAINED, "smoe_dropout", "hash"]


def make(variant: str) -> Gate:
    return build(variant, 7, 3, UNSATURATED).float()


def assert_same_bits(actual: Route, expected: Route) -> None:
    assert actual.weight_N.dtype == expected.weight_N.dtype
    assert torch.equal(actual.token_N, expected.token_N)
    assert torch.equal(actual.slot_N, expected.slot_N)
    assert torch.equal(actual.weight_N, expected.weight_N)
    assert actual.aux.keys() == expected.aux.keys()
    for name, loss in expected.aux.items():
        assert actual.aux[name].dtype == loss.dtype
        assert torch.equal(actual.aux[name], loss)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_changes_no_bit(variant: str, input_dtype: torch.dtype) -> None:
    gate, x_TD = make(variant), torch.randn(TOKENS, DIM).to(input_dtype)
    expected = gate(x_TD, IDS_T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = gate(x_TD, IDS_T)
    assert route.weight_N.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
    assert_same_bits(route, expected)


@pytest.mark.parametrize("variant", TRAINED)
def test_gradients_under_autocast_are_those_without(variant: str) -> None:
    gate, x_TD = make(variant), torch.randn(TOKENS, DIM)
    cotangent_TE = torch.randn(TOKENS, gate.num_experts)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            route = gate(x_TD, IDS_T)
        loss = (route.dense() * cotangent_TE).sum() + sum(route.aux.values())
        grads.append(torch.autograd.grad(loss, list(gate.parameters())))
    for plain, autocast in zip(*grads, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_only_rounded_never_computed_with(variant: str, input_dtype: torch.dtype) -> None:
    gate, x_TD = make(variant), torch.randn(TOKENS, DIM).to(input_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = gate(x_TD, IDS_T)
    assert_same_bits(route, gate(x_TD.float(), IDS_T))


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_parameters_are_only_rounded_never_computed_with(variant: str) -> None:
    gate, x_TD = make(variant).bfloat16(), torch.randn(TOKENS, DIM)
    assert_same_bits(gate(x_TD, IDS_T), gate.float()(x_TD, IDS_T))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp64_in_fp64_out(variant: str) -> None:
    gate, x_TD = make(variant), torch.randn(TOKENS, DIM, dtype=torch.float64)
    route = gate(x_TD, IDS_T)
    assert_same_bits(route, gate.double()(x_TD, IDS_T))
    assert route.weight_N.dtype == torch.float64


@pytest.mark.parametrize("variant", [*TRAINED, "smoe_dropout"])
def test_fp64_is_computed_in_fp64(variant: str) -> None:
    gate, x_TD = make(variant), torch.randn(TOKENS, DIM, dtype=torch.float64)
    route = gate(x_TD, IDS_T)
    assert (gate.float()(x_TD.float(), IDS_T).weight_N.double() - route.weight_N).abs().max() > 1e-12
