"""Several matrices, rounding R, and the hard forward pass, against naive ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Comet, Gate, TopK
from dist_moe.routing import HardMap, Route, SlotMap, SoftPermutation, StraightThroughPermutation
from dist_moe.search import PermutationSearch, PermutationSearchConfig, SlotTable, give_branches_slots
from dist_moe.search.agreement import round_to_table
from tests.helpers.branches import hard_map, naive_branch_mix, naive_branch_relabel, naive_branch_sum
from tests.helpers.oracle import assert_same, naive_permutation_entropy, naive_sinkhorn

N, GATES, BRANCHES, STAGE, TOKENS = 4, 3, 2, 6, 5


def make_search(**options: Any) -> PermutationSearch:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"temperature": (1e-1, 1e-2), "iterations": (3, 7), "branches": BRANCHES}
    search = PermutationSearch(N, STAGE, GATES, **(sizes | options)).double()
    torch.nn.init.normal_(search.relaxed, std=0.1)
    return search


def naive_soft(search: PermutationSearch) -> Tensor:
    """(P, K, n, n), after the first step."""
    matrices = [naive_sinkhorn(matrix / 10 ** (-1 - 1 / STAGE), 3) for matrix in search.relaxed.flatten(0, 1)]
    return torch.stack(matrices).view_as(search.relaxed)


def mixtures() -> list[Tensor]:
    weights = [torch.rand(TOKENS, BRANCHES * N, dtype=torch.float64) for _ in range(GATES)]
    sparse = [w_TS * (torch.rand(TOKENS, BRANCHES * N) < 0.5) for w_TS in weights]
    return [w_TS.requires_grad_() for w_TS in sparse]


def apply_all(permutations: list[SlotMap], weights: list[Tensor]) -> list[Tensor]:
    return [p.apply(Route.from_dense(w_TS)).dense() for p, w_TS in zip(permutations, weights, strict=True)]


@pytest.mark.parametrize("per_gate", [False, True])
def test_soft_mixtures_and_penalty_of_every_gate_and_branch(per_gate: bool) -> None:
    search = make_search(per_gate=per_gate, entropy_weight=0.3)
    assert search.relaxed.shape == search.soft.shape == (GATES if per_gate else 1, BRANCHES, N, N)
    search.begin_step()
    permutations, aux = search.train()()
    assert all(isinstance(p, SoftPermutation) for p in permutations)
    soft, weights = naive_soft(search), mixtures()
    assert_same(search.soft, soft, 1e-12)
    expected = [naive_branch_mix(w_TS, soft[g if per_gate else 0]) for g, w_TS in enumerate(weights)]
    actual = apply_all(list(permutations), weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs, 1e-12)
    penalties = [naive_permutation_entropy(matrix) for matrix in soft.flatten(0, 1)]
    penalty = 0.3 * sum(penalties) / len(penalties)
    assert_same(aux["permutation"], penalty, 1e-12)
    cotangent_TE = torch.randn(TOKENS, N, dtype=torch.float64)
    losses = [
        penalty_of + sum(((g + 1) * y_TE * cotangent_TE).sum() for g, y_TE in enumerate(ys))
        for ys, penalty_of in ((actual, aux["permutation"]), (expected, penalty))
    ]
    assert_same(*(torch.autograd.grad(loss, search.relaxed)[0] for loss in losses), 1e-10)


def test_gates_share_a_table_or_have_one_each() -> None:
    for per_gate in (False, True):
        table = SlotTable(N, GATES, per_gate=per_gate, branches=BRANCHES)
        assert table.table.tolist() == [[list(range(N))] * BRANCHES] * (GATES if per_gate else 1)
        table.table.copy_(shuffled(table))
        permutations, aux = table()
        assert aux == {}
        weights = mixtures()
        for g, (ours, w_TS) in enumerate(zip(apply_all(list(permutations), weights), weights, strict=True)):
            assert_same(ours, naive_branch_relabel(w_TS.detach(), table.table[g if per_gate else 0]), 1e-15)
        matrix = table.current_matrix()
        assert matrix.shape == (*table.table.shape, N)
        assert torch.equal(matrix.argmax(-1), table.table)
        assert matrix.sum() == table.table.numel()


def shuffled(table: SlotTable) -> Tensor:
    return torch.rand(table.table.shape).argsort(-1)


@pytest.mark.parametrize("rounding", ["soft", "relaxed"])
def test_what_is_rounded(rounding: str) -> None:
    """A soft matrix whose columns were normalised last may round to another table than R."""
    search = make_search(rounding=rounding, per_gate=True)
    search.begin_step()
    search.train()()
    with torch.no_grad():
        search.relaxed.normal_()
    search.begin_evaluation()
    source = search.soft if rounding == "soft" else search.relaxed.detach()
    other = search.relaxed.detach() if rounding == "soft" else search.soft
    assert search.table.tolist() == [[round_to_table(m).tolist() for m in of_gate] for of_gate in source]
    assert search.table.tolist() != [[round_to_table(m).tolist() for m in of_gate] for of_gate in other]
    search.step.fill_(STAGE - 1)
    search.table.zero_()
    search.begin_step()
    assert search.table.tolist() == [[round_to_table(m).tolist() for m in of_gate] for of_gate in source]


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("rounding", ["soft", "relaxed"])
def test_a_hard_forward_pass_is_the_hard_route_with_the_soft_gradient(per_gate: bool, rounding: str) -> None:
    search = make_search(per_gate=per_gate, rounding=rounding, forward="hard")
    for _ in range(3):
        search.begin_step()
        permutations, _ = search.train()()
        with torch.no_grad():
            search.relaxed.add_(torch.randn_like(search.relaxed), alpha=0.1)
    search.step.fill_(0)
    search.begin_step()
    permutations, _ = search.train()()
    assert all(isinstance(p, StraightThroughPermutation) for p in permutations)
    weights, soft = mixtures(), naive_soft(search)
    routes = [p.apply(Route.from_dense(w_TS)) for p, w_TS in zip(permutations, weights, strict=True)]
    cotangent_TE = torch.randn(TOKENS, N, dtype=torch.float64)
    ours, theirs = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    for g, (route, w_TS) in enumerate(zip(routes, weights, strict=True)):
        p = g if per_gate else 0
        hard = hard_map(search.table[p], N).apply(Route.from_dense(w_TS))
        for name in ("token_N", "slot_N", "weight_N"):
            assert torch.equal(getattr(route, name), getattr(hard, name)), name
        used_TE = naive_branch_relabel(w_TS.detach(), search.table[p]) != 0
        assert 0 < used_TE.sum() < used_TE.numel()
        ours = ours + ((g + 1) * route.dense() * cotangent_TE).sum()
        theirs = theirs + ((g + 1) * naive_branch_sum(w_TS.detach(), soft[p]) * used_TE * cotangent_TE).sum()
    grads = [torch.autograd.grad(loss, search.relaxed)[0] for loss in (ours, theirs)]
    assert_same(*grads, 1e-10)
    assert grads[0].any()


def test_a_hard_forward_pass_rounds_the_soft_matrix_of_its_own_step() -> None:
    """Values and gradients of a step are those of one permutation; the last of the stage stays."""
    search, tables = make_search(forward="hard"), []
    for step in range(STAGE + 3):
        before = search.table.clone()
        search.begin_step()
        assert not search.soft.requires_grad
        tables.append(search.table.tolist())
        permutations, _ = search.train()()
        if step + 1 < STAGE:
            assert tables[-1] == [[round_to_table(m).tolist() for m in of_gate] for of_gate in search.soft]
        else:
            assert torch.equal(search.table, before)
        kind = StraightThroughPermutation if step + 1 < STAGE else HardMap
        assert all(isinstance(p, kind) for p in permutations)
        with torch.no_grad():
            search.relaxed.normal_(std=0.1)
    assert all(one != next_one for one, next_one in pairwise(tables[: STAGE - 1]))
    assert all(isinstance(p, HardMap) for p in search.eval()()[0])


def test_configuration_gives_branches_slots_of_their_own() -> None:
    gates: list[Gate] = [Comet(3, N, k=2), Comet(3, N, k=2)]
    search = PermutationSearchConfig(
        epochs=1, per_gate=True, per_branch=True, rounding="relaxed", forward="hard"
    ).build(gates, 7)
    assert search.table.shape == (2, 2, N)
    assert (search.stage_steps, search.rounds_relaxed, search.straight_through) == (7, True, True)
    assert all(gate.splits_branches and gate.num_slots == 2 * N for gate in gates)
    shared: list[Gate] = [Comet(3, N, k=2), Comet(3, N, k=2)]
    assert PermutationSearchConfig(per_gate=True).build(shared, 7).table.shape == (2, 1, N)
    assert not any(gate.splits_branches for gate in shared)


def test_gates_with_another_number_of_branches_are_refused() -> None:
    table = SlotTable(N, 2, branches=2)
    with pytest.raises(ValueError, match=r"2 tables per gate do not fit a gate of 1 branch"):
        give_branches_slots([Comet(3, N, k=2), TopK(3, N)], table)
