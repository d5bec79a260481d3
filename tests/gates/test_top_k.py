"""Top-k: exactly k assignments, chosen by index, a softmax over the kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.gates import TopK, TopKConfig
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients, naive_top_k


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_values_and_gradients_equal_naive_with_exactly_k_assignments(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(2, 17))
    k = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.integers(0, 5))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    gate = TopK(3, num_experts, k).double()
    torch.nn.init.normal_(gate.bias)
    x_TD = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    cotangent_TE = torch.randn(tokens, num_experts, dtype=torch.float64)
    leaves = dict(gate.named_parameters()) | {"x": x_TD}

    route = gate(x_TD)
    expected_TE = naive_top_k(gate, x_TD)
    assert torch.bincount(route.token_N, minlength=tokens).tolist() == [k] * tokens
    assert_same(route.dense(), expected_TE, 1e-14)
    actual = gradients((route.dense() * cotangent_TE).sum(), leaves)
    assert_all_same(actual, naive_gradients((expected_TE * cotangent_TE).sum(), leaves), 1e-13)


def test_kept_logit_of_exactly_zero_counts() -> None:
    gate = TopK(2, 4, 2)
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([-1.0, 0.0, -2.0, 0.0]))
    route = gate(torch.randn(3, 2))
    assert route.slot_N.tolist() == [1, 3] * 3
    assert route.weight_N.tolist() == [0.5] * 6


def test_all_logits_zero_still_keeps_k() -> None:
    gate = TopK(2, 4, 3)
    route = gate(torch.zeros(5, 2))
    assert torch.bincount(route.token_N).tolist() == [3] * 5
    assert_same(route.weight_N, torch.full((15,), 1 / 3), 1e-7)


def test_k_equal_n_is_the_dense_softmax() -> None:
    torch.manual_seed(0)
    gate = TopK(3, 6, 6).double()
    x_TD = torch.randn(4, 3, dtype=torch.float64)
    assert_same(gate(x_TD).dense(), (x_TD @ gate.weight.T + gate.bias).softmax(1), 1e-15)


def test_parameters_are_glorot_uniform_and_zero() -> None:
    torch.manual_seed(0)
    gate = TopK(100, 20)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {"weight": (20, 100), "bias": (20,)}
    bound = (6 / 120) ** 0.5
    assert 0.98 * bound < gate.weight.abs().max() <= bound
    assert not gate.bias.any()


def test_no_auxiliary_loss() -> None:
    assert TopK(2, 4)(torch.randn(3, 2)).aux == {}


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 5), (1, 1), (4, -1)])
def test_impossible_sizes_are_refused(num_experts: int, k: int) -> None:
    with pytest.raises(ValueError, match="num_experts"):
        TopK(3, num_experts, k)


def test_wrong_token_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T, 3\), got \(5, 4\)"):
        TopK(3, 4)(torch.zeros(5, 4))


def test_config_builds_the_gate_it_describes() -> None:
    gate = TopKConfig(k=3).build(dim=4, num_experts=6)
    assert (gate.dim, gate.num_experts, gate.k) == (4, 6, 3)
