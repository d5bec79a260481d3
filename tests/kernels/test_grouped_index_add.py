"""Numbers added at columns of each group's own: values and gradients, absent columns, groups without rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.kernels import grouped_index_add
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.kernels.cases import drawn


def naive(y_NF: Tensor, x_NQ: Tensor, column_EQ: list[list[int]], counts: list[int]) -> Tensor:
    expert_N = [expert for expert, rows in enumerate(counts) for _ in range(rows)]
    rows = []
    for expert, y_F, x_Q in zip(expert_N, y_NF, x_NQ, strict=True):
        numbers = list(y_F.unbind())
        for column, x in zip(column_EQ[expert], x_Q, strict=True):
            if column >= 0:
                numbers[column] = numbers[column] + x
        rows.append(torch.stack(numbers))
    return torch.stack(rows) if rows else y_NF.clone()


@pytest.mark.parametrize("on_device", [False, True])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    groups=st.lists(st.tuples(st.integers(0, 3), st.permutations([-1, -1, 0, 1, 2, 3, 4])), min_size=1, max_size=5),
    width=st.integers(0, 6),
)
def test_equals_naive(on_device: bool, groups: list[tuple[int, list[int]]], width: int) -> None:
    counts, columns = [rows for rows, _ in groups], [column_Q[:width] for _, column_Q in groups]
    leaves = {"y": drawn(sum(counts), 5), "x": drawn(sum(counts), width, seed=8)}
    column_EQ = torch.tensor(columns, dtype=torch.int32).view(len(groups), width)
    actual = grouped_index_add(leaves["y"] * 1, leaves["x"], column_EQ, torch.tensor(counts) if on_device else counts)
    expected = naive(*leaves.values(), columns, counts)
    assert_same(actual, expected, 1e-15)
    cotangent = torch.randn(5, sum(counts), dtype=torch.float64).T  # not contiguous
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves),
        {
            name: torch.zeros_like(leaves[name]) if grad is None else grad
            for name, grad in zip(
                leaves,
                torch.autograd.grad((expected * cotangent).sum(), list(leaves.values()), allow_unused=True),
                strict=True,
            )
        },
        1e-15,
    )
