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


def naive_heaviest(weight_TS: Tensor, most: int) -> Tensor:
    """Each row's ``most`` largest entries, of equal ones the first, divided by their sum."""
    kept_TS = torch.zeros_like(weight_TS)
    for t, row in enumerate(weight_TS.tolist()):
        slots = [s for s in range(len(row)) if row[s] > 0]
        kept = sorted(slots, key=lambda s: (-row[s], s))[:most]
        for s in kept:
            kept_TS[t, s] = row[s] / sum(row[each] for each in kept)
    return kept_TS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sparse_matrices(), st.integers(1, 6))
def test_heaviest_assignments_and_ties(weight_TS: Tensor, most: int) -> None:
    """The drawn weights are few, so that ties are common."""
    route = Route.from_dense(weight_TS).heaviest(most)
    torch.testing.assert_close(route.dense(), naive_heaviest(weight_TS, most), rtol=1e-12, atol=0)
    assert torch.equal(route.tokens_per_slot, (naive_heaviest(weight_TS, most) != 0).sum(0))


def test_heaviest_does_not_depend_on_the_order_of_the_assignments() -> None:
    """After a hard permutation the slots of a token are not in ascending order; its weights go with them."""
    route = Route(
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([2, 0, 1, 1, 0]),
        torch.tensor([0.2, 0.5, 0.3, 0.9, 0.1], dtype=torch.float64),
        num_tokens=3,
        num_slots=3,
    ).heaviest(2)
    expected = torch.tensor([[0.625, 0.375, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(route.dense(), expected)


def test_gradient_through_the_heaviest_is_that_of_their_shares() -> None:
    weight_TS = torch.tensor([[3.0, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    route = Route.from_dense(weight_TS).heaviest(2)
    (grad,) = torch.autograd.grad(route.dense()[0, 2], weight_TS)
    torch.testing.assert_close(grad, torch.tensor([[-4.0 / 49, 0.0, 3.0 / 49]], dtype=torch.float64))


ASSIGNMENTS = st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.125, 0.25, 1.0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(ASSIGNMENTS, max_size=25))
def test_merge_adds_up_repeated_pairs(assignments: list[tuple[int, int, float]]) -> None:
    expected_TS = torch.zeros(4, 5, dtype=torch.float64)
    for token, slot, weight in assignments:
        expected_TS[token, slot] += weight
    token_N, slot_N = (torch.tensor([a[i] for a in assignments], dtype=torch.int64) for i in (0, 1))
    weight_N = torch.tensor([a[2] for a in assignments], dtype=torch.float64).requires_grad_()
    aux = {"entropy": torch.ones(())}
    route = Route.merge(token_N, slot_N, weight_N, 4, 5, aux)
    pairs = list(zip(route.token_N.tolist(), route.slot_N.tolist(), strict=True))
    assert pairs == sorted({(token, slot) for token, slot, _ in assignments})
    assert torch.equal(route.dense(), expected_TS)
    assert (route.num_tokens, route.num_slots, route.aux) == (4, 5, aux)
    cotangent_TS = torch.arange(20, dtype=torch.float64).view(4, 5)
    (grad,) = torch.autograd.grad((route.dense() * cotangent_TS).sum(), weight_N)
    assert torch.equal(grad, cotangent_TS[token_N, slot_N])


def test_keep_is_a_mask_over_assignments() -> None:
    aux = {"entropy": torch.ones(())}
    route = Route.from_dense(torch.tensor([[0.5, 0.25], [0.0, 2.0]]), aux).keep(torch.tensor([True, False, True]))
    assert route.dense().tolist() == [[0.5, 0.0], [0.0, 2.0]]
    assert route.aux is aux
    assert route.num_assignments == 2


def test_without_tokens_there_is_nothing_to_keep() -> None:
    empty = Route.from_dense(torch.zeros(0, 3))
    for route in (empty.heaviest(2), empty.keep(torch.zeros(0, dtype=torch.bool))):
        assert (route.num_tokens, route.num_slots, route.num_assignments) == (0, 3, 0)
