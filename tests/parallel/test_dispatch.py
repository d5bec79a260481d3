"""Dispatch and combine between emulated ranks, on rows that know where they come from."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.parallel import EmulatedWorld, SingleWorld, World, combine, dispatch, plan_dispatch

Counts = list[list[int]]


@st.composite
def counts_per_rank(draw: st.DrawFn) -> Counts:
    """counts[r][e]: rows of rank r for global expert e."""
    num_ranks = draw(st.integers(1, 5))
    num_experts = num_ranks * draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 3), min_size=num_experts, max_size=num_experts)
    return draw(st.lists(row, min_size=num_ranks, max_size=num_ranks))


def labelled_rows(counts: Counts, rank: int) -> Tensor:
    """One row (rank, expert, number) per row that the rank sends, sorted by expert."""
    rows = [(rank, expert, i) for expert, count in enumerate(counts[rank]) for i in range(count)]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(counts_per_rank())
@example([[0, 0, 0, 0], [0, 0, 0, 0]])
@example([[0, 3, 0], [0, 0, 0], [2, 0, 1]])
def test_rows_arrive_by_local_expert_then_by_source(counts: Counts) -> None:
    def arrive(world: World) -> tuple[list[list[float]], list[int]]:
        plan = plan_dispatch(torch.tensor(counts[world.rank]), world)
        return dispatch(labelled_rows(counts, world.rank), plan, world).tolist(), plan.rows_per_local_expert

    num_ranks = len(counts)
    per_rank = len(counts[0]) // num_ranks
    for rank, (arrived, rows_per_local_expert) in enumerate(EmulatedWorld(num_ranks).run(arrive)):
        experts = range(rank * per_rank, (rank + 1) * per_rank)
        expected = [
            [float(s), float(e), float(i)] for e in experts for s in range(num_ranks) for i in range(counts[s][e])
        ]
        assert arrived == expected
        assert rows_per_local_expert == [sum(row[e] for row in counts) for e in experts]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(counts_per_rank())
@example([[0, 0, 0, 0], [0, 0, 0, 0]])
def test_gradient_of_a_row_comes_from_its_own_result(counts: Counts) -> None:
    """Dispatch, then combine: the expert multiplies by its id, the source weighs by the row's own label."""
    per_rank = len(counts[0]) // len(counts)

    def scale(world: World) -> tuple[Tensor, Tensor, Tensor]:
        x_ND = labelled_rows(counts, world.rank).requires_grad_()
        plan = plan_dispatch(torch.tensor(counts[world.rank]), world)
        ids = torch.arange(world.rank * per_rank, (world.rank + 1) * per_rank)
        factor_N = (1.0 + ids).repeat_interleave(torch.tensor(plan.rows_per_local_expert))
        y_ND = combine(dispatch(x_ND, plan, world) * factor_N.unsqueeze(1), plan, world)
        weight_ND = 1.0 + labelled_rows(counts, world.rank)
        return x_ND.detach(), y_ND.detach(), torch.autograd.grad((y_ND * weight_ND).sum(), x_ND)[0]

    for x_ND, y_ND, grad_ND in EmulatedWorld(len(counts)).run(scale):
        factor_N1 = 1.0 + x_ND[:, 1:2]
        assert torch.equal(y_ND, x_ND * factor_N1)
        assert torch.equal(grad_ND, (1.0 + x_ND) * factor_N1)


def test_one_rank_moves_nothing() -> None:
    world = SingleWorld()
    plan = plan_dispatch(torch.tensor([2, 0, 1]), world)
    x_ND = torch.randn(3, 2)
    assert plan.rows_per_local_expert == [2, 0, 1]
    assert dispatch(x_ND, plan, world) is x_ND
    assert combine(x_ND, plan, world) is x_ND
    assert (world.traffic.rows, world.traffic.bytes) == (0, 0)
