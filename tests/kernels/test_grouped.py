"""Linear maps and LayerNorms per group of rows against plain references: values, gradients, empty groups, precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dist_moe.kernels import (
    grouped_layer_norm,
    grouped_layer_norm_reference,
    grouped_linear,
    grouped_linear_reference,
)
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.kernels.cases import drawn, zero_and_not

EPS = 1e-5
Grouped = Callable[..., Tensor]


def norm(function: Grouped) -> Grouped:
    return lambda x, weight, bias, counts: function(x, weight, bias, EPS, counts)


KERNELS = {
    "linear": (grouped_linear, grouped_linear_reference),
    "layer_norm": (norm(grouped_layer_norm), norm(grouped_layer_norm_reference)),
}
both_kernels = pytest.mark.parametrize("name", KERNELS)


def make_inputs(name: str, counts: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    weight, out = ((len(counts), 5, 4), 4) if name == "linear" else ((len(counts), 5), 5)
    shapes = {"x": (sum(counts), 5), "weight": weight, "bias": (len(counts), out)}
    return {name: drawn(*shape, dtype=dtype, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("name", "on_device"), [("linear", False), ("layer_norm", False), ("layer_norm", True)])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_equals_reference(name: str, on_device: bool, counts: list[int]) -> None:
    inputs, (ours, reference) = make_inputs(name, counts), KERNELS[name]
    actual = ours(*inputs.values(), torch.tensor(counts) if on_device else counts)
    expected = reference(*inputs.values(), counts)
    assert_same(actual, expected, 1e-13)
    cotangent = torch.randn(expected.shape[1], sum(counts), dtype=torch.float64).T  # not contiguous
    assert_all_same(*(gradients((y * cotangent).sum(), inputs) for y in (actual, expected)), 1e-11)


@both_kernels
@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 5, 0], [1, 0, 1]])
def test_group_without_rows_has_zero_gradient_not_none(name: str, counts: list[int]) -> None:
    inputs = make_inputs(name, counts)
    KERNELS[name][0](*inputs.values(), counts).square().sum().backward()
    assert zero_and_not([inputs["weight"], inputs["bias"]]) == [[count > 0 for count in counts]] * 2


def test_input_that_is_not_contiguous() -> None:
    inputs = make_inputs("linear", [2, 3])
    x_ND = torch.randn(5, 5, dtype=torch.float64).T
    arguments = (x_ND, inputs["weight"].transpose(1, 2).contiguous().transpose(1, 2), inputs["bias"], [2, 3])
    assert_same(grouped_linear(*arguments), grouped_linear_reference(*arguments), 1e-14)


def test_bf16_autocast_computes_in_bf16_and_gives_fp32_gradients() -> None:
    counts = [3, 0, 2]
    inputs = make_inputs("linear", counts, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = grouped_linear(*inputs.values(), counts)
    assert actual.dtype == torch.bfloat16
    rounded = {name: tensor.detach().bfloat16().double().requires_grad_() for name, tensor in inputs.items()}
    expected = grouped_linear_reference(*rounded.values(), counts)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-6)
    assert_gradients_near(actual, inputs, expected, rounded, atol=2**-5)


def assert_gradients_near(
    actual: Tensor, inputs: dict[str, Tensor], expected: Tensor, wide: dict[str, Tensor], atol: float
) -> None:
    grads, expected_grads = gradients(actual.float().sum(), inputs), gradients(expected.sum(), wide)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        torch.testing.assert_close(grad.double(), expected_grads[name], rtol=2**-7, atol=atol)


def test_one_group_is_torchs_layer_norm() -> None:
    x_ND, weight_1D, bias_1D = make_inputs("layer_norm", [7]).values()
    expected = F.layer_norm(x_ND, (5,), weight_1D[0], bias_1D[0], EPS)
    assert_same(grouped_layer_norm(x_ND, weight_1D, bias_1D, EPS, [7]), expected, 1e-14)


def test_bf16_rows_are_normalised_in_fp32() -> None:
    counts = [3, 0, 4]
    inputs = make_inputs("layer_norm", counts, torch.bfloat16)
    actual = grouped_layer_norm(*inputs.values(), EPS, counts)
    assert actual.dtype == torch.bfloat16
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = grouped_layer_norm_reference(*wide.values(), EPS, counts)
    assert torch.equal(actual, expected.bfloat16())
    assert_gradients_near(actual, inputs, expected, wide, atol=2**-6)


@both_kernels
@pytest.mark.parametrize("counts", [[2, 3], [2, 3, 1], [5], [2, 2, 0], [2, 3, 0, 0]])
def test_counts_that_do_not_fit_are_refused(name: str, counts: list[int]) -> None:
    with pytest.raises(ValueError, match="3 groups and 5 rows do not fit the counts"):
        KERNELS[name][0](*make_inputs(name, [2, 3, 0]).values(), counts)
