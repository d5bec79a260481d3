"""Run by test_interpreter.py, under Triton's interpreter: what only Triton's kernels can be asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_moe.kernels.gpu import triton_gemm, triton_rows
from tests.helpers.host import NoLook

ENDS_E = torch.tensor([3, 3, 9], dtype=torch.int32)
TOKEN_N = torch.tensor([0, 2, 0, 1, 2, 2, 0, 1, 2])
BY_TOKEN_N, START_T1 = TOKEN_N.argsort(stable=True), torch.tensor([0, 3, 5, 9])
X_ND, WEIGHT_EDF, WEIGHT_1N = torch.randn(9, 4), torch.randn(3, 4, 6), torch.rand(1, 9)

LAUNCHES: dict[str, Callable[[], object]] = {
    "products": lambda: triton_gemm.rows_times_weights(X_ND, WEIGHT_EDF, torch.randn(3, 6), ENDS_E),
    "outer sums": lambda: triton_gemm.outer_sums(X_ND, X_ND, ENDS_E),
    "group sums": lambda: triton_gemm.group_sums(X_ND, ENDS_E),
    "gather": lambda: triton_rows.gather(X_ND, TOKEN_N, torch.bfloat16),
    "token sums": lambda: triton_rows.token_sums(X_ND, WEIGHT_1N, BY_TOKEN_N, START_T1, torch.float32),
    "token sums, backward": lambda: triton_rows.token_sums_backward(torch.randn(1, 3, 4), X_ND, WEIGHT_1N, TOKEN_N),
    "gated": lambda: triton_rows.gated(X_ND, X_ND, "silu"),
    "gated, backward": lambda: triton_rows.gated_backward(*X_ND.new_empty(5, 9, 4), "silu"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_does_not_look_at_values(name: str) -> None:
    with NoLook():
        LAUNCHES[name]()


def test_token_sums_are_the_same_bits_every_time_and_add_in_the_order_of_the_rows() -> None:
    rows_NF = torch.tensor([[2.0**30], [1.0], [-(2.0**30)], [1.0]])
    start_T1 = torch.tensor([0, 4])

    def summed(order: list[int]) -> float:
        sums_GTF = triton_rows.token_sums(rows_NF, torch.ones(1, 4), torch.tensor(order), start_T1, torch.float32)
        return sums_GTF.item()

    assert summed([0, 1, 2, 3]) == 1.0
    assert summed([0, 2, 1, 3]) == 2.0


@pytest.mark.parametrize("counts", [[1] * 20, [0] * 20 + [70] + [0] * 20, [17, 16, 15, 0, 64, 1]], ids=["1", "2", "3"])
def test_every_row_finds_its_group(counts: list[int]) -> None:
    groups = len(counts)
    group_N = torch.arange(groups).repeat_interleave(torch.tensor(counts))
    weight_EDF = torch.arange(1.0, groups + 1).view(-1, 1, 1).expand(-1, 1, 2)
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    actual: Tensor = triton_gemm.rows_times_weights(torch.ones(len(group_N), 1), weight_EDF, None, ends_E)
    assert actual.tolist() == [[e + 1.0] * 2 for e in group_N.tolist()]
