"""How torch's ``grouped_mm`` is called, and when: on a CPU, which has it too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_moe.kernels import FeedForwardWeights, feed_forward, feed_forward_reference
from dist_moe.kernels.gpu import grouped_gemm
from tests.helpers.oracle import assert_all_same, gradients
from tests.kernels.cases import drawn, in_fp64, leaves_of

COUNTS = [5, 0, 11, 0]

bf16 = partial(drawn, dtype=torch.bfloat16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on compute capability 9, for CPU tensors; the shapes of the results of ``grouped_mm``."""
    shapes: list[tuple[int, ...]] = []
    original = F.grouped_mm

    def counted(*arguments: Tensor, offs: Tensor) -> Tensor:
        assert offs.dtype == torch.int32
        result = original(*arguments, offs=offs)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(F, "grouped_mm", counted)
    monkeypatch.setattr(grouped_gemm, "_on_gpu", lambda x: True)
    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: 9)
    return shapes


def test_all_products_of_a_network_in_bf16_without_bias(calls: list[tuple[int, ...]]) -> None:
    weights = FeedForwardWeights(bf16(4, 8, 16), bf16(4, 16, 24), bf16(4, 8, 16))
    leaves = leaves_of(bf16(16, 8), weights)
    actual = gradients(feed_forward(leaves["x"], weights, "silu", torch.tensor(COUNTS)).float().square().sum(), leaves)
    exact = in_fp64(leaves)
    fp64_weights = FeedForwardWeights(exact["up"], exact["down"], exact["gate"])
    expected = gradients(feed_forward_reference(exact["x"], fp64_weights, "silu", COUNTS).square().sum(), exact)
    assert_all_same({name: grad.double() for name, grad in actual.items()}, expected, 2**-5)
    assert sorted(calls) == sorted([(16, 16)] * 3 + [(16, 24)] + [(16, 8)] * 2 + [(4, 8, 16)] * 2 + [(4, 16, 24)])


def test_not_for_fp32_nor_for_widths_that_are_not_aligned(calls: list[tuple[int, ...]]) -> None:
    ends_E = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    grouped_gemm.products(bf16(16, 8).float(), bf16(4, 8, 16).float(), ends_E)
    grouped_gemm.products(bf16(16, 9), bf16(4, 9, 16), ends_E)
    grouped_gemm.products(bf16(16, 8), bf16(4, 8, 12), ends_E)
    grouped_gemm.outer_sums(bf16(16, 8), bf16(16, 12), ends_E)
    assert calls == []


def test_gradients_of_weights_are_not_its_where_a_group_without_rows_would_not_get_zeros(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_gemm, "_capability", lambda device: 10)
    ends_E = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    grouped_gemm.products(bf16(16, 8), bf16(4, 8, 16), ends_E)
    grouped_gemm.outer_sums(bf16(16, 8), bf16(16, 16), ends_E)
    assert calls == [(16, 16)]


def test_never_on_a_cpu_by_itself() -> None:
    assert not grouped_gemm._takes(torch.tensor(COUNTS), bf16(16, 8), bf16(4, 8, 16))


@pytest.mark.parametrize(("groups", "times"), [(1023, 1), (1024, 0), (1500, 0)])
def test_not_for_more_groups_than_it_takes(calls: list[tuple[int, ...]], groups: int, times: int) -> None:
    counts_E = torch.arange(groups) % 2
    x_ND, weight_EDF = bf16(groups // 2, 8), bf16(groups, 8, 8)
    actual = grouped_gemm.products(x_ND, weight_EDF, counts_E.cumsum(0, dtype=torch.int32))
    expected = torch.einsum("nd,ndf->nf", x_ND.double(), weight_EDF[counts_E.bool()].double())
    torch.testing.assert_close(actual.double(), expected, rtol=2**-6, atol=2**-6)
    assert len(calls) == times
