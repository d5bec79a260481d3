"""Hard and soft permutations: P[s, e] = 1 relabels slot s as expert e."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.routing import HardPermutation, Route, SoftPermutation
from tests.helpers.oracle import assert_same, naive_mix, naive_relabel, naive_sinkhorn


def random_mixture(tokens: int, slots: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    weight_TS = torch.rand(tokens, slots, dtype=torch.float64) * (torch.rand(tokens, slots) < 0.5)
    return weight_TS / weight_TS.sum(1, keepdim=True).clamp(min=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.permutations(range(5)), st.integers(0, 1000))
def test_hard_relabels_and_equals_a_soft_one_that_is_hard(tokens: int, table: list[int], seed: int) -> None:
    mixture_TS = random_mixture(tokens, 5, seed)
    route = HardPermutation(torch.tensor(table)).apply(Route.from_dense(mixture_TS))
    assert torch.equal(route.dense(), naive_relabel(mixture_TS, table))
    matrix_SS = torch.zeros(5, 5, dtype=torch.float64)
    for slot, expert in enumerate(table):
        matrix_SS[slot, expert] = 1.0
    mixed = SoftPermutation(matrix_SS).apply(Route.from_dense(mixture_TS))
    assert_same(mixed.dense(), route.dense(), 1e-15)
    assert torch.equal(mixed.dense() != 0, route.dense() != 0)


def test_hard_keeps_weights_aux_and_number_of_assignments() -> None:
    route = Route.from_dense(random_mixture(4, 3, 0), {"entropy": torch.ones(())})
    relabelled = HardPermutation(torch.tensor([2, 0, 1])).apply(route)
    assert relabelled.weight_N is route.weight_N
    assert relabelled.aux is route.aux
    assert relabelled.num_assignments == route.num_assignments


def test_soft_mixes_and_normalises_rows() -> None:
    """A Sinkhorn iteration that has not converged: rows of the matrix do not sum to 1."""
    mixture_TS = random_mixture(6, 4, 1)
    mixture_TS[2] = 0.0
    matrix_SS = naive_sinkhorn(torch.randn(4, 4, dtype=torch.float64) * 3, 1)
    assert (matrix_SS.sum(1) - 1).abs().max() > 0.05
    route = SoftPermutation(matrix_SS).apply(Route.from_dense(mixture_TS))
    has_mass = mixture_TS.sum(1) > 0
    assert 0 < has_mass.sum() < 6
    assert_same(route.dense()[has_mass], naive_mix(mixture_TS[has_mass], matrix_SS), 1e-14)
    assert torch.equal(route.dense()[~has_mass], mixture_TS[~has_mass])


def test_soft_works_without_tokens_and_keeps_aux() -> None:
    aux = {"entropy": torch.ones(())}
    route = SoftPermutation(torch.eye(3)).apply(Route.from_dense(torch.zeros(0, 3), aux))
    assert (route.num_tokens, route.num_assignments, route.aux) == (0, 0, aux)
