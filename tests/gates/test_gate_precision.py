"""Gates compute in fp32 under any autocast and for any input below fp64, which stays fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, NullSlots, SMoEDropout, Softmax, TopK
from dist_moe.routing import Route

TOKENS, DIM, EXPERTS = 24, 16, 8
IDS_T = torch.arange(TOKENS) % 5


def make_comet(**options: bool) -> Gate:
    torch.manual_seed(0)
    gate = Comet(DIM, EXPERTS, 2, gamma=1.0, entropy_weight=0.7, balance_weight=0.1, **options)
    torch.nn.init.normal_(gate.split_weight, std=0.1)
    return gate


def make_lazy_comet() -> Gate:
    return make_comet(lazy=True)


def make_top_k() -> Gate:
    torch.manual_seed(0)
    return TopK(DIM, EXPERTS, 2, balance_weight=0.3, z_loss_weight=0.1)


def make_sigmoid_top_k() -> Gate:
    torch.manual_seed(0)
    return TopK(DIM, EXPERTS, 2, scores="sigmoid", balance_weight=0.3, bias_update_rate=0.1)


def make_dselect_k() -> Gate:
    torch.manual_seed(0)
    gate = DSelectK(DIM, EXPERTS - 1, 2)
    torch.nn.init.normal_(gate.bit_weight, std=0.1)
    return gate


def make_softmax() -> Gate:
    torch.manual_seed(0)
    return Softmax(DIM, EXPERTS)


def make_ada_moe() -> Gate:
    torch.manual_seed(0)
    return NullSlots(TopK(DIM, EXPERTS + 4, 3), 4, balance_weight=0.3)


def make_smoe_dropout() -> Gate:
    torch.manual_seed(0)
    return SMoEDropout(DIM, EXPERTS, 3, 3, schedule_steps=10)


def make_hash() -> Gate:
    return HashRouting(DIM, EXPERTS, torch.ones(5))


TRAINED = [
    make_comet,
    make_lazy_comet,
    make_top_k,
    make_sigmoid_top_k,
    make_dselect_k,
    make_softmax,
    make_ada_moe,
]
MAKERS = [*TRAINED, make_smoe_dropout, make_hash]


def assert_same_bits(actual: Route, expected: Route) -> None:
    assert actual.weight_N.dtype == expected.weight_N.dtype
    assert torch.equal(actual.token_N, expected.token_N)
    assert torch.equal(actual.slot_N, expected.slot_N)
    assert torch.equal(actual.weight_N, expected.weight_N)
    assert actual.aux.keys() == expected.aux.keys()
    for name, loss in expected.aux.items():
        assert actual.aux[name].dtype == loss.dtype
        assert torch.equal(actual.aux[name], loss)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_changes_no_bit(make: Callable[[], Gate], input_dtype: torch.dtype) -> None:
    gate, x_TD = make(), torch.randn(TOKENS, DIM).to(input_dtype)
    expected = gate(x_TD, IDS_T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = gate(x_TD, IDS_T)
    assert route.weight_N.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
    assert_same_bits(route, expected)


@pytest.mark.parametrize("make", TRAINED)
def test_gradients_under_autocast_are_those_without(make: Callable[[], Gate]) -> None:
    gate, x_TD = make(), torch.randn(TOKENS, DIM)
    cotangent_TE = torch.randn(TOKENS, gate.num_experts)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            route = gate(x_TD, IDS_T)
        loss = (route.dense() * cotangent_TE).sum() + sum(route.aux.values())
        grads.append(torch.autograd.grad(loss, list(gate.parameters())))
    for plain, autocast in zip(*grads, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_only_rounded_never_computed_with(
    make: Callable[[], Gate], input_dtype: torch.dtype
) -> None:
    gate, x_TD = make(), torch.randn(TOKENS, DIM).to(input_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = gate(x_TD, IDS_T)
    assert_same_bits(route, gate(x_TD.float(), IDS_T))


@pytest.mark.parametrize("make", MAKERS)
def test_low_precision_parameters_are_only_rounded_never_computed_with(make: Callable[[], Gate]) -> None:
    gate, x_TD = make().bfloat16(), torch.randn(TOKENS, DIM)
    assert_same_bits(gate(x_TD, IDS_T), gate.float()(x_TD, IDS_T))


@pytest.mark.parametrize("make", MAKERS)
def test_fp64_in_fp64_out(make: Callable[[], Gate]) -> None:
    gate, x_TD = make(), torch.randn(TOKENS, DIM, dtype=torch.float64)
    route = gate(x_TD, IDS_T)
    assert_same_bits(route, gate.double()(x_TD, IDS_T))
    assert route.weight_N.dtype == torch.float64


@pytest.mark.parametrize("make", [*TRAINED, make_smoe_dropout])
def test_fp64_is_computed_in_fp64(make: Callable[[], Gate]) -> None:
    gate, x_TD = make(), torch.randn(TOKENS, DIM, dtype=torch.float64)
    route = gate(x_TD, IDS_T)
    assert (gate.float()(x_TD.float(), IDS_T).weight_N.double() - route.weight_N).abs().max() > 1e-12
