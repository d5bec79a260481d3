"""The kernels for accelerators against the plain references: values, all gradients, empties, skew, precision.

Here torch loops stand in for Triton; test_interpreter.py runs the same tests on Triton's kernels.
"""

from __future__ import annotations

import os
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_moe.kernels import (
    ACTIVATIONS,
    FeedForwardWeights,
    TokenIndex,
    feed_forward,
    feed_forward_reference,
    gpu,
    grouped_linear,
    grouped_linear_reference,
    rows_of_tokens,
    rows_of_tokens_reference,
    weighted_scatter,
    weighted_scatter_reference,
)
from dist_moe.kernels.gpu import grouped_gemm, networks
from dist_moe.kernels.gpu.rows import _token_sums
from tests.helpers.device_path import device_path_forced
from tests.helpers.oracle import assert_all_same, gradients
from tests.kernels.cases import assert_like_fp64, drawn, leaves_of, networks_of, zero_and_not

COUNTS = [[0, 0, 0], [4, 0, 1], [0, 20, 0], [3]]
FORMS = [("gelu", 0, 1), ("relu", 0, 0), ("silu", 1, 0), ("gelu", 1, 1), ("relu", 1, 0)]
CASES = [
    *((*form, [1, 18, 2], torch.float64, 4, 6) for form in FORMS),
    *(("silu", 1, 1, counts, torch.float64, 4, 6) for counts in COUNTS),
    *(("silu", 1, 1, [1, 18, 0, 7], dtype, 4, 6) for dtype in (torch.float32, torch.bfloat16)),
    ("silu", 1, 0, [40, 0, 23], torch.float32, 37, 70),  # tiles that do not fit the widths
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}


@pytest.mark.parametrize(("activation", "gated", "bias", "counts", "dtype", "width", "hidden"), CASES)
def test_feed_forward(
    activation: str, gated: int, bias: int, counts: list[int], dtype: torch.dtype, width: int, hidden: int
) -> None:
    x_ND, weights = networks_of(counts, gated, bias, dtype, width, hidden)
    # Products of bf16 hidden rows that have been rounded: errors are those of a few roundings of large sums.
    tolerance = 4 * TOLERANCE[dtype] if dtype == torch.bfloat16 else TOLERANCE[dtype] * width

    def ours(x: Tensor, **parts: Tensor) -> Tensor:
        return feed_forward(x, FeedForwardWeights(**parts), activation, torch.tensor(counts))

    def reference(x: Tensor, **parts: Tensor) -> Tensor:
        return feed_forward_reference(x, FeedForwardWeights(**parts), activation, counts)

    assert_like_fp64(ours, reference, leaves_of(x_ND, weights), tolerance)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grouped_linear(counts: list[int], dtype: torch.dtype) -> None:
    groups = len(counts)
    leaves = {
        "x_ND": drawn(sum(counts), 5, dtype=dtype),
        "weight_EDF": drawn(groups, 5, 6, dtype=dtype),
        "bias_EF": drawn(groups, 6, dtype=dtype),
    }
    assert_like_fp64(
        lambda **parts: grouped_linear(**parts, rows_per_group=torch.tensor(counts)),
        lambda **parts: grouped_linear_reference(**parts, rows_per_group=counts),
        leaves,
        2 * TOLERANCE[dtype],
    )


@pytest.mark.parametrize("gated", [0, 1])
def test_slices_change_nothing(gated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "FEWEST_ROWS", 5)
    test_feed_forward("silu", gated, 1, [3, 0, 12, 1], torch.float64, 4, 6)


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_is_so_where_it_is_in_the_reference(activation: str, gated: int) -> None:
    counts = [2, 0, 3]
    x_ND, weights = networks_of(counts, gated, 1)
    x_ND.data[1, 0] = torch.nan
    leaves, found = leaves_of(x_ND, weights), []
    for f, c in ((feed_forward_reference, counts), (feed_forward, counts), (feed_forward, torch.tensor(counts))):
        y_ND = f(x_ND, weights, activation, c)
        values = gradients(y_ND.square().sum(), leaves) | {"y": y_ND}
        found.append({name: value.isnan().tolist() for name, value in values.items()})
    assert found[1] == found[2] == found[0]
    assert any(found[0]["y"][1])


def test_group_without_rows_has_zero_gradient_not_none() -> None:
    x_ND, weights = networks_of([2, 0, 3], 1, 1)
    feed_forward(x_ND, weights, "silu", torch.tensor([2, 0, 3])).sum().backward()
    assert zero_and_not(weights) == [[True, False, True]] * 5


@pytest.mark.parametrize("gated", [0, 1])
def test_two_backward_passes_through_a_kept_graph_agree(gated: int) -> None:
    x_ND, weights = networks_of([2, 0, 3], gated, 0)
    y_ND = feed_forward(x_ND, weights, "silu", torch.tensor([2, 0, 3]))
    first, second = (torch.autograd.grad(y_ND.sum(), x_ND, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)


def test_a_graph_that_was_not_kept_is_refused_not_wrong() -> None:
    x_ND, weights = networks_of([2, 0, 3], 1, 0)
    y_ND = feed_forward(x_ND, weights, "silu", torch.tensor([2, 0, 3]))
    y_ND.sum().backward()
    with pytest.raises(RuntimeError):
        y_ND.sum().backward()


def test_rows_and_gradients_that_are_not_contiguous() -> None:
    counts = [2, 0, 3]
    _, weights = networks_of(counts, 1, 1)
    x_ND = drawn(4, 5).detach().T.requires_grad_()
    cotangent = drawn(7, 5).detach().T
    actual, expected = (
        gradients((f(x_ND, weights, "gelu", c) * cotangent).sum(), leaves_of(x_ND, weights))
        for f, c in ((feed_forward, torch.tensor(counts)), (feed_forward_reference, counts))
    )
    assert_all_same(actual, expected, 1e-12)


def test_counts_for_other_groups_are_refused() -> None:
    x_ND, weights = networks_of([2, 3], 0, 0)
    with pytest.raises(ValueError, match="2 groups and 5 rows do not fit the counts"):
        feed_forward(x_ND, weights, "relu", torch.tensor([2, 3, 0]))


TOKENS = [(0, 0), (0, 3), (20, 9), (12, 1), (5, 12)]


@pytest.mark.parametrize(("rows", "tokens"), TOKENS)
@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_scatter(rows: int, tokens: int, gates: int, dtype: torch.dtype) -> None:
    token_N = torch.randint(max(tokens, 1), (rows,), generator=torch.Generator().manual_seed(rows))
    index = TokenIndex.of(token_N, tokens)
    weights = torch.promote_types(dtype, torch.float32)
    leaves = {"rows_NF": drawn(rows, 13, dtype=dtype), "weight_GN": drawn(gates, rows, dtype=weights)}
    assert_like_fp64(
        lambda rows_NF, weight_GN: gpu.WeightedScatter.apply(rows_NF, weight_GN, *index),
        lambda **parts: weighted_scatter_reference(**parts, index=index),
        leaves,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize(("rows", "tokens"), TOKENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_tokens(rows: int, tokens: int, dtype: torch.dtype) -> None:
    token_N = torch.randint(max(tokens, 1), (rows,), generator=torch.Generator().manual_seed(rows))
    index = TokenIndex.of(token_N, tokens)
    with device_path_forced():
        assert_like_fp64(
            lambda x_TD: rows_of_tokens(x_TD, index),
            lambda x_TD: rows_of_tokens_reference(x_TD, index),
            {"x_TD": drawn(tokens, 13, dtype=dtype)},
            TOLERANCE[dtype],
        )


def test_rows_are_gathered_in_the_type_of_autocast_and_their_gradients_come_back_in_their_own() -> None:
    x_TD = drawn(3, 5, dtype=torch.float32)
    with device_path_forced(), torch.autocast("cpu", dtype=torch.bfloat16):
        rows_ND = rows_of_tokens(x_TD, TokenIndex.of(torch.tensor([2, 0, 2]), 3))
    assert rows_ND.dtype == torch.bfloat16
    rows_ND.sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.dtype == torch.float32
    assert x_TD.grad.sum(1).tolist() == [5, 0, 10]


def test_weighted_scatter_takes_the_path_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = mock.Mock()
    monkeypatch.setattr(gpu, "WeightedScatter", taken)
    arguments = (torch.ones(2, 3), torch.ones(1, 2), TokenIndex.of(torch.tensor([0, 1]), 2))
    weighted_scatter(*arguments)
    with device_path_forced():
        weighted_scatter(*arguments)
    assert taken.apply.call_count == 1


def test_sums_of_bf16_rows_are_not_bf16() -> None:
    """A bf16 sum of ones stops at 256."""
    ends_E = torch.tensor([300, 300], dtype=torch.int32)
    ones = torch.ones(300, 16, dtype=torch.bfloat16)
    assert grouped_gemm.group_sums(ones, ends_E)[:, 0].tolist() == [300, 0]
    assert grouped_gemm.outer_sums(ones, ones, ends_E)[:, 0, 0].tolist() == [300, 0]
    long = torch.ones(2, 300, dtype=torch.bfloat16)
    products = grouped_gemm.products(long, torch.ones(1, 300, 3, dtype=torch.bfloat16), torch.tensor([2]))
    assert products.unique().tolist() == [300]
    weight_1N = torch.ones(1, 300)
    sums = _token_sums(ones, weight_1N, torch.arange(300), torch.tensor([0, 300]), torch.float32)
    assert sums.unique().tolist() == [300]


def test_all_activations_are_tested() -> None:
    assert {activation for activation, *_ in FORMS} == set(ACTIVATIONS)


def test_what_computed() -> None:
    """Last: the tests above ran on Triton's kernels exactly where they were meant to."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    used = {name for name in sys.modules if name.startswith("dist_moe.kernels.gpu.triton_")}
    assert bool(used) == interpreted
