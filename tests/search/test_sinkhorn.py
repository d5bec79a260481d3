"""Sinkhorn in log space against naive loops; rows first, columns last."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.search.agreement import round_to_table
from dist_moe.search.sinkhorn import permutation_entropy, sinkhorn
from tests.helpers.oracle import assert_same, naive_permutation_entropy, naive_sinkhorn


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.integers(0, 12), st.floats(0.1, 20), st.integers(0, 1000))
def test_equals_naive_loops_in_value_and_gradient(n: int, iterations: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = (scale * torch.randn(n, n, dtype=torch.float64)).requires_grad_()
    cotangent = torch.randn(n, n, dtype=torch.float64)
    results = [f(logits, iterations) for f in (sinkhorn, naive_sinkhorn)]
    assert_same(*results, 1e-11)
    grads = [torch.autograd.grad((p * cotangent).sum(), logits)[0] for p in results]
    assert_same(*grads, 1e-10)


def test_columns_are_normalised_last() -> None:
    torch.manual_seed(0)
    soft = sinkhorn(5 * torch.randn(6, 6, dtype=torch.float64), 2)
    assert_same(soft.sum(0), torch.ones(6, dtype=torch.float64), 1e-14)
    assert (soft.sum(1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-7])
def test_finite_in_fp32_at_every_temperature_of_the_schedule(temperature: float) -> None:
    torch.manual_seed(0)
    relaxed = torch.empty(16, 16).uniform_(-0.05, 0.05).requires_grad_()
    soft = sinkhorn(relaxed / temperature, 150)
    (grad,) = torch.autograd.grad(permutation_entropy(soft), relaxed)
    assert soft.isfinite().all()
    assert grad.isfinite().all()
    torch.testing.assert_close(soft.sum(0), torch.ones(16))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_entropy_equals_naive(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = (2 * torch.randn(n, n, dtype=torch.float64)).requires_grad_()
    soft = naive_sinkhorn(logits, 1)
    values = [f(soft) for f in (permutation_entropy, naive_permutation_entropy)]
    assert_same(*values, 1e-12)
    assert_same(*[torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values], 1e-12)


def test_entropy_of_a_permutation_is_nearly_zero_and_of_the_uniform_matrix_the_largest() -> None:
    assert permutation_entropy(torch.eye(5)).abs().item() < 1e-4
    uniform = permutation_entropy(torch.full((4, 4), 0.25, dtype=torch.float64))
    assert uniform.item() == pytest.approx(2 * 4 * torch.tensor(4.0).log().item(), rel=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_rounding_is_the_best_of_all_permutations(n: int, seed: int) -> None:
    soft = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    table = round_to_table(soft)
    best = max(sum(soft[s, e].item() for s, e in enumerate(p)) for p in itertools.permutations(range(n)))
    assert sorted(table.tolist()) == list(range(n))
    assert table.dtype == torch.int64
    assert sum(soft[s, e].item() for s, e in enumerate(table.tolist())) == pytest.approx(best)


def test_rounding_a_permutation_matrix_gives_slot_to_expert() -> None:
    matrix = torch.zeros(4, 4)
    for slot, expert in enumerate([2, 0, 3, 1]):
        matrix[slot, expert] = 1.0
    assert round_to_table(matrix).tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_rounding_refuses_what_is_not_finite(poison: float) -> None:
    soft = torch.eye(3)
    soft[1, 2] = poison
    with pytest.raises(FloatingPointError, match="NaN or an infinity"):
        round_to_table(soft)
