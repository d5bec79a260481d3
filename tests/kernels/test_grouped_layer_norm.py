"""LayerNorm with a scale and a shift per group against its plain reference: values, gradients, empties, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dist_moe.kernels import grouped_layer_norm, grouped_layer_norm_reference
from tests.helpers.oracle import assert_all_same, assert_same, gradients

EPS = 1e-5


def make_inputs(counts: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + len(counts))
    shapes = {"x": (sum(counts), 5), "weight": (len(counts), 5), "bias": (len(counts), 5)}
    draws = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: draw.to(dtype).requires_grad_() for name, draw in draws.items()}


@pytest.mark.parametrize("on_device", [False, True])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_equals_reference(on_device: bool, counts: list[int]) -> None:
    inputs = make_inputs(counts)
    actual = grouped_layer_norm(*inputs.values(), EPS, torch.tensor(counts) if on_device else counts)
    expected = grouped_layer_norm_reference(*inputs.values(), EPS, counts)
    assert_same(actual, expected, 1e-13)
    cotangent = torch.randn(5, sum(counts), dtype=torch.float64).T  # not contiguous
    assert_all_same(*(gradients((y * cotangent).sum(), inputs) for y in (actual, expected)), 1e-11)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 5, 0], [1, 0, 1]])
def test_group_without_rows_has_zero_gradient_not_none(counts: list[int]) -> None:
    inputs = make_inputs(counts)
    grouped_layer_norm(*inputs.values(), EPS, counts).square().sum().backward()
    for name in ("weight", "bias"):
        grad = inputs[name].grad
        assert grad is not None
        assert [bool(each.any()) for each in grad] == [count > 0 for count in counts]


def test_one_group_is_torchs_layer_norm() -> None:
    inputs = make_inputs([7])
    x_ND, weight_1D, bias_1D = inputs.values()
    expected = F.layer_norm(x_ND, (5,), weight_1D[0], bias_1D[0], EPS)
    assert_same(grouped_layer_norm(x_ND, weight_1D, bias_1D, EPS, [7]), expected, 1e-14)


def test_bf16_rows_are_normalised_in_fp32() -> None:
    counts = [3, 0, 4]
    inputs = make_inputs(counts, torch.bfloat16)
    actual = grouped_layer_norm(*inputs.values(), EPS, counts)
    assert actual.dtype == torch.bfloat16
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = grouped_layer_norm_reference(*wide.values(), EPS, counts)
    assert torch.equal(actual, expected.bfloat16())
    grads, expected_grads = gradients(actual.sum(), inputs), gradients(expected.sum(), wide)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), expected_grads[name], rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("counts", [[2, 3], [2, 2, 0], [2, 3, 0, 0]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="3 groups and 5 rows do not fit the counts"):
        grouped_layer_norm(*make_inputs([2, 3, 0]).values(), EPS, counts)
