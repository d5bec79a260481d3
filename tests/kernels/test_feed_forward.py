"""The feed-forward kernel against its plain reference: values, all gradients, one core and several, precision."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from dist_moe.kernels import ACTIVATIONS, across_cores, feed_forward, feed_forward_reference
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.kernels.cases import leaves_of, networks_of, zero_and_not

COUNTS = [[0, 0, 0], [4, 0, 1], [1, 9, 2], [0, 30, 0]]
FORMS = [(activation, gated, bias) for activation in sorted(ACTIVATIONS) for gated, bias in product((0, 1), (0, 1))]


@pytest.fixture(params=["one core", "two cores"])
def _cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(across_cores, "SMALLEST_WORTH_A_THREAD", 0)
    torch.set_num_threads(2 if request.param == "two cores" else 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_cores")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)
def test_equals_reference(activation: str, gated: int, bias: int, counts: list[int]) -> None:
    x_ND, weights = networks_of(counts, gated, bias)
    actual, expected = (f(x_ND, weights, activation, counts) for f in (feed_forward, feed_forward_reference))
    assert_same(actual, expected, 1e-13)
    cotangent = torch.randn_like(expected)
    actual_grads, expected_grads = (
        gradients((y * cotangent).sum(), leaves_of(x_ND, weights)) for y in (actual, expected)
    )
    assert_all_same(actual_grads, expected_grads, 1e-12)


@pytest.mark.usefixtures("_cores")
def test_group_without_rows_has_zero_gradient_not_none() -> None:
    counts = [2, 0, 3]
    x_ND, weights = networks_of(counts, 1, 1)
    feed_forward(x_ND, weights, "silu", counts).sum().backward()
    assert zero_and_not(weights) == [[True, False, True]] * 5


def test_gradient_and_rows_that_are_not_contiguous() -> None:
    counts = [2, 0, 3]
    _, weights = networks_of(counts, 1, 1)
    x_ND = torch.randn(4, 5, dtype=torch.float64).T.requires_grad_()
    cotangent = torch.randn(7, 5, dtype=torch.float64).T
    actual, expected = (
        gradients((f(x_ND, weights, "gelu", counts) * cotangent).sum(), leaves_of(x_ND, weights))
        for f in (feed_forward, feed_forward_reference)
    )
    assert_all_same(actual, expected, 1e-12)


def test_bf16_autocast_computes_in_bf16_and_gives_fp32_gradients() -> None:
    counts = [3, 0, 2]
    x_ND, weights = networks_of(counts, 1, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = feed_forward(x_ND, weights, "silu", counts)
    assert actual.dtype == torch.bfloat16
    expected = feed_forward_reference(x_ND.double(), weights.each(Tensor.double), "silu", counts)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-5, atol=2**-4)
    for grad in gradients(actual.float().sum(), leaves_of(x_ND, weights)).values():
        assert grad.dtype == torch.float32


def test_nothing_but_rows_and_what_goes_into_the_activation_is_kept() -> None:
    kept: list[tuple[int, ...]] = []
    x_ND, weights = networks_of([4, 3], 0, 1)
    own = {id(leaf) for leaf in leaves_of(x_ND, weights).values()}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        feed_forward(x_ND, weights, "relu", [4, 3])
    assert kept == [(7, 6)]


@pytest.mark.parametrize("counts", [[2, 3], [2, 3, 1], [2, 2, 0], [2, 3, 0, 0]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    x_ND, weights = networks_of([2, 3, 0], 0, 0)
    with pytest.raises(ValueError, match="3 groups and 5 rows do not fit the counts"):
        feed_forward(x_ND, weights, "relu", counts)
