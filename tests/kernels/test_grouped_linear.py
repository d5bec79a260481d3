"""The grouped linear map against its plain reference: values, all gradients, empty groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.kernels import grouped_linear, grouped_linear_reference
from tests.helpers.oracle import assert_all_same, assert_same, gradients


def make_inputs(counts: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + len(counts))
    shapes = {"x": (sum(counts), 3), "weight": (len(counts), 3, 4), "bias": (len(counts), 4)}
    draws = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: draw.to(dtype).requires_grad_() for name, draw in draws.items()}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_equals_reference(counts: list[int]) -> None:
    inputs = make_inputs(counts)
    actual, expected = (f(*inputs.values(), counts) for f in (grouped_linear, grouped_linear_reference))
    assert actual.shape == (sum(counts), 4)
    assert_same(actual, expected, 1e-14)
    cotangent = torch.randn(sum(counts), 4, dtype=torch.float64)
    actual_grads, expected_grads = (gradients((y * cotangent).sum(), inputs) for y in (actual, expected))
    assert_all_same(actual_grads, expected_grads, 1e-13)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 5, 0], [1, 0, 1]])
def test_group_without_rows_has_zero_gradient_not_none(counts: list[int]) -> None:
    inputs = make_inputs(counts)
    grouped_linear(*inputs.values(), counts).sum().backward()
    for name in ("weight", "bias"):
        grad = inputs[name].grad
        assert grad is not None
        assert [bool(each.any()) for each in grad] == [count > 0 for count in counts]


def test_gradient_that_is_not_contiguous() -> None:
    counts = [2, 0, 3]
    inputs = make_inputs(counts)
    results = [f(*inputs.values(), counts) for f in (grouped_linear, grouped_linear_reference)]
    cotangent = torch.randn(4, 5, dtype=torch.float64).T
    actual, expected = (gradients((y * cotangent).sum() + y.sum(), inputs) for y in results)
    assert_all_same(actual, expected, 1e-13)


def test_input_that_is_not_contiguous() -> None:
    counts = [2, 3]
    inputs = make_inputs(counts)
    x_ND = torch.randn(3, 5, dtype=torch.float64).T
    arguments = (x_ND, inputs["weight"].transpose(1, 2).contiguous().transpose(1, 2), inputs["bias"], counts)
    assert_same(grouped_linear(*arguments), grouped_linear_reference(*arguments), 1e-14)


def test_bf16_autocast_computes_in_bf16_and_gives_fp32_gradients() -> None:
    counts = [3, 0, 2]
    inputs = make_inputs(counts, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = grouped_linear(*inputs.values(), counts)
    assert actual.dtype == torch.bfloat16
    rounded = {name: tensor.detach().bfloat16().double().requires_grad_() for name, tensor in inputs.items()}
    expected = grouped_linear_reference(*rounded.values(), counts)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-6)
    actual_grads, expected_grads = gradients(actual.float().sum(), inputs), gradients(expected.sum(), rounded)
    for name, grad in actual_grads.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), expected_grads[name], rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("counts", [[2, 3], [2, 3, 1], [5], [2, 2, 0], [2, 3, 0, 0]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    inputs = make_inputs([2, 3, 0])
    with pytest.raises(ValueError, match="3 groups and 5 rows do not fit the counts"):
        grouped_linear(*inputs.values(), counts)
