"""Route holds exactly the non-zeros of a mixture, and gives them back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.routing import Route


@st.composite
def sparse_matrices(draw: st.DrawFn) -> Tensor:
    tokens, slots = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    entry = st.one_of(st.just(0.0), st.sampled_from([1e-300, 1e-12, 0.25, 1.0, 3.0]))
    values = draw(st.lists(entry, min_size=tokens * slots, max_size=tokens * slots))
    return torch.tensor(values, dtype=torch.float64).view(tokens, slots)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sparse_matrices())
def test_round_trip_keeps_every_non_zero_however_small(weight_TS: Tensor) -> None:
    route = Route.from_dense(weight_TS)
    expected = [(t, s) for t, row in enumerate(weight_TS.tolist()) for s, w in enumerate(row) if w != 0]
    assert list(zip(route.token_N.tolist(), route.slot_N.tolist(), strict=True)) == expected
    assert route.weight_N.tolist() == [weight_TS[t, s].item() for t, s in expected]
    assert (route.num_tokens, route.num_slots) == tuple(weight_TS.shape)
    assert route.num_assignments == len(expected)
    assert torch.equal(route.dense(), weight_TS)
    assert torch.equal(route.tokens_per_slot, (weight_TS != 0).sum(0))
    assert route.tokens_per_slot.dtype == torch.int64


def test_gradient_reaches_the_non_zeros_only() -> None:
    weight_TS = torch.tensor([[0.5, 0.0], [0.0, 2.0]], requires_grad=True)
    (Route.from_dense(weight_TS).dense() * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert weight_TS.grad is not None
    assert weight_TS.grad.tolist() == [[1.0, 0.0], [0.0, 4.0]]


def test_slots_without_tokens_count_zero() -> None:
    assert Route.from_dense(torch.zeros(3, 4)).tokens_per_slot.tolist() == [0, 0, 0, 0]
    assert Route.from_dense(torch.zeros(0, 4)).tokens_per_slot.tolist() == [0, 0, 0, 0]


def test_auxiliary_losses_travel_along() -> None:
    aux = {"entropy": torch.tensor(2.0)}
    assert Route.from_dense(torch.ones(1, 2), aux).aux == aux
    assert Route.from_dense(torch.ones(1, 2)).aux == {}
