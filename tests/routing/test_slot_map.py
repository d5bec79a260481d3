"""Slot maps, many to one, and relaxed permutations: P[s, e] = 1 relabels slot s as expert e, branch by branch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.routing import Route, SlotMap, SoftPermutation, StraightThroughPermutation, mix
from tests.helpers.branches import hard_map, naive_branch_mix, naive_branch_relabel, naive_branch_sum
from tests.helpers.oracle import assert_same, gradients, naive_gradients, naive_sinkhorn

N = 5


def random_mixture(tokens: int, slots: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    weight_TS = torch.rand(tokens, slots, dtype=torch.float64) * (torch.rand(tokens, slots) < 0.5)
    return weight_TS / weight_TS.sum(1, keepdim=True).clamp(min=1e-12)


def random_tables(branches: int, n: int = N) -> Tensor:
    return torch.stack([torch.randperm(n) for _ in range(branches)])


def matrices_of(table_KE: Tensor) -> Tensor:
    """(K, n, n) fp64."""
    branches, n = table_KE.shape
    matrix_KEE = torch.zeros(branches, n, n, dtype=torch.float64)
    for j in range(branches):
        for s in range(n):
            matrix_KEE[j, s, int(table_KE[j, s])] = 1.0
    return matrix_KEE


def unconverged_matrices(branches: int, n: int = N) -> Tensor:
    """Rows that do not sum to 1."""
    matrices = [naive_sinkhorn(torch.randn(n, n, dtype=torch.float64) * 3, 1) for _ in range(branches)]
    matrix_KEE = torch.stack(matrices)
    assert (matrix_KEE.sum(2) - 1).abs().max() > 0.05
    return matrix_KEE


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 1000))
def test_hard_relabels_and_equals_a_soft_one_that_is_hard(tokens: int, branches: int, seed: int) -> None:
    mixture_TS = random_mixture(tokens, branches * N, seed)
    table_KE = random_tables(branches)
    route = hard_map(table_KE, N).apply(Route.from_dense(mixture_TS))
    expected_TE = naive_branch_relabel(mixture_TS, table_KE)
    assert (route.num_tokens, route.num_slots) == (tokens, N)
    assert route.num_assignments == int((expected_TE != 0).sum())
    assert_same(route.dense(), expected_TE, 1e-15)
    mixed = SoftPermutation(matrices_of(table_KE)).apply(Route.from_dense(mixture_TS))
    assert_same(mixed.dense(), route.dense(), 1e-15)
    assert torch.equal(mixed.dense() != 0, route.dense() != 0)


def test_hard_keeps_weights_aux_and_number_of_assignments() -> None:
    route = Route.from_dense(random_mixture(4, 3, 0), {"entropy": torch.ones(())})
    relabelled = hard_map(torch.tensor([[2, 0, 1]]), 3).apply(route)
    assert relabelled.weight_N is route.weight_N
    assert relabelled.aux is route.aux
    assert relabelled.num_assignments == route.num_assignments


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(0, 1000))
def test_any_table_gives_the_dense_mixture_times_its_matrix(
    tokens: int, branches: int, slots: int, experts: int, seed: int
) -> None:
    """Values and gradients; pairs in order, none twice; and no merging only where no slots meet."""
    mixture_TS = random_mixture(tokens, branches * slots, seed).requires_grad_()
    table_KS = torch.randint(experts, (branches, slots))
    matrix_SE = torch.zeros(branches * slots, experts, dtype=torch.float64)
    for slot, expert in enumerate(table_KS.flatten().tolist()):
        matrix_SE[slot, expert] = 1.0
    slot_map = hard_map(table_KS, experts)
    assert slot_map.merges == (branches > 1 or len(set(table_KS[0].tolist())) < slots)

    route = slot_map.apply(Route.from_dense(mixture_TS))
    assert (route.num_tokens, route.num_slots) == (tokens, experts)
    key_N = route.token_N * experts + route.slot_N
    assert len(key_N.unique()) == len(key_N) == int(((mixture_TS.detach() @ matrix_SE) != 0).sum())
    assert bool((route.token_N.diff() >= 0).all())
    assert_same(route.dense(), mixture_TS @ matrix_SE, 1e-14)
    cotangent_TE = torch.randn(tokens, experts, dtype=torch.float64)
    actual = gradients((route.dense() * cotangent_TE).sum(), {"mixture": mixture_TS})["mixture"]
    assert_same(actual, (cotangent_TE @ matrix_SE.T) * (mixture_TS.detach() != 0), 1e-14)


@pytest.mark.parametrize("expert", [-1, 3])
def test_a_table_that_names_no_expert_is_refused(expert: int) -> None:
    with pytest.raises(ValueError, match=rf"names expert {expert}; allowed: 0\.\.2"):
        hard_map(torch.tensor([[0, 1, expert, 2]]), 3)


def test_branches_that_choose_the_same_expert_add_up() -> None:
    """Two trees of two leaves: both reach expert 1 with token 0; with token 1 they part."""
    weight_TS = torch.tensor([[0.25, 0.0, 0.0, 0.75], [0.5, 0.0, 0.5, 0.0]], requires_grad=True)
    route = hard_map(torch.tensor([[1, 0], [0, 1]]), 2).apply(Route.from_dense(weight_TS, {"entropy": torch.ones(())}))
    assert route.token_N.tolist() == [0, 1, 1]
    assert route.slot_N.tolist() == [1, 0, 1]
    assert route.weight_N.tolist() == [1.0, 0.5, 0.5]
    assert route.aux == {"entropy": torch.ones(())}
    (route.weight_N * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight_TS.grad is not None
    assert weight_TS.grad.tolist() == [[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_soft_mixes_and_keeps_each_tokens_total(branches: int) -> None:
    """A Sinkhorn iteration that has not converged, and totals that are not 1: of capped gates, of null slots."""
    mixture_TS = random_mixture(6, branches * 4, 1) * torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1, 1.0]).double().unsqueeze(1)
    matrix_KEE = unconverged_matrices(branches, 4)
    route = SoftPermutation(matrix_KEE).apply(Route.from_dense(mixture_TS))
    assert_same(route.dense(), naive_branch_mix(mixture_TS, matrix_KEE), 1e-14)
    assert_same(route.dense().sum(1), mixture_TS.sum(1), 1e-14)
    assert not route.dense()[2].any()


@pytest.mark.parametrize("branches", [1, 2])
def test_gradients_of_the_mix_equal_naive(branches: int) -> None:
    mixture_TS = random_mixture(5, branches * 4, 2)
    mixture_TS[3] = 0.0
    mixture_TS.requires_grad_()
    matrix_KEE = unconverged_matrices(branches, 4).requires_grad_()
    cotangent_TE = torch.randn(5, 4, dtype=torch.float64)
    mixed = [mix(mixture_TS.view(5, branches, 4), matrix_KEE), naive_branch_mix(mixture_TS, matrix_KEE)]
    assert_same(*mixed, 1e-14)
    leaves = (mixture_TS, matrix_KEE)
    actual, expected = ([*torch.autograd.grad((m * cotangent_TE).sum(), leaves)] for m in mixed)
    assert_same(actual[1], expected[1], 1e-12)
    has_mass = mixture_TS.detach().sum(1) > 0
    assert_same(actual[0][has_mass], expected[0][has_mass], 1e-12)
    assert actual[0].isfinite().all()


def test_a_soft_permutation_is_applied_in_the_precision_of_the_route() -> None:
    mixture_TS = random_mixture(4, N, 3).float()
    matrix_KEE = unconverged_matrices(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = SoftPermutation(matrix_KEE).apply(Route.from_dense(mixture_TS))
    assert route.weight_N.dtype == torch.float32
    assert_same(route.dense().double(), naive_branch_mix(mixture_TS.double(), matrix_KEE), 1e-6)


@pytest.mark.parametrize("branches", [1, 3])
def test_every_kind_works_without_tokens_and_keeps_aux(branches: int) -> None:
    aux = {"entropy": torch.ones(())}
    table_KE = torch.arange(3).repeat(branches, 1)
    matrix_KEE = torch.eye(3).repeat(branches, 1, 1).requires_grad_()
    kinds: list[SlotMap] = [
        hard_map(table_KE, 3),
        SoftPermutation(matrix_KEE),
        StraightThroughPermutation(matrix_KEE, hard_map(table_KE, 3)),
    ]
    for kind in kinds:
        route = kind.apply(Route.from_dense(torch.zeros(0, 3 * branches), aux))
        assert (route.num_tokens, route.num_slots, route.num_assignments, route.aux) == (0, 3, 0, aux)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 1000))
def test_straight_through_has_the_values_of_the_table_and_the_gradients_of_the_matrix(
    tokens: int, branches: int, seed: int
) -> None:
    mixture_TS = random_mixture(tokens, branches * N, seed).requires_grad_()
    matrix_KEE, table_KE = unconverged_matrices(branches).requires_grad_(), random_tables(branches)
    hard = hard_map(table_KE, N).apply(Route.from_dense(mixture_TS))
    route = StraightThroughPermutation(matrix_KEE, hard_map(table_KE, N)).apply(Route.from_dense(mixture_TS))
    for name in ("token_N", "slot_N", "weight_N"):
        assert torch.equal(getattr(route, name), getattr(hard, name)), name

    cotangent_TE = torch.randn(tokens, N, dtype=torch.float64)
    used_TE = hard.dense().detach() != 0
    soft_TE = naive_branch_sum(mixture_TS.detach(), matrix_KEE)
    through = gradients((route.dense() * cotangent_TE).sum(), {"weights": mixture_TS, "matrix": matrix_KEE})
    hard_loss = (naive_branch_relabel(mixture_TS, table_KE) * cotangent_TE).sum()
    of_weights = naive_gradients(hard_loss, {"weights": mixture_TS})["weights"]
    of_matrix = naive_gradients((soft_TE * used_TE * cotangent_TE).sum(), {"matrix": matrix_KEE})["matrix"]
    assert_same(through["weights"], of_weights * (mixture_TS != 0), 1e-14)
    assert_same(through["matrix"], of_matrix, 1e-14)
    assert through["matrix"].any() == mixture_TS.any()
