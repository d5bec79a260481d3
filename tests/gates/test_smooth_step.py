"""The smooth-step: the paper's cubic, never outside [0, 1], flat where it is saturated."""

from __future__ import annotations

import pytest
import torch

from dist_moe.gates.base import smooth_step
from tests.helpers.oracle import naive_smooth_step

GAMMAS = [0.001, 0.1, 1.0, 10.0]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradient_equal_the_cubic_in_fp64(gamma: float) -> None:
    t = torch.linspace(-0.7 * gamma, 0.7 * gamma, 57, dtype=torch.float64).requires_grad_()
    left, right = smooth_step(t, gamma)
    expected = torch.stack([naive_smooth_step(each, gamma) for each in t])
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(right, 1 - expected, rtol=0, atol=1e-14)
    weight = torch.linspace(1, 2, 57, dtype=torch.float64)
    for ours, theirs in ((left, expected), (right, 1 - expected)):
        grads = [torch.autograd.grad((each * weight).sum(), t, retain_graph=True)[0] for each in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-13 / gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_stays_between_0_and_1_in_fp32_just_inside_the_edges(gamma: float, side: float) -> None:
    inside = [torch.tensor(side * gamma / 2)]
    for _ in range(2000):
        inside.append(torch.nextafter(inside[-1], torch.tensor(0.0)))
    left, right = smooth_step(torch.stack(inside), gamma)
    for each in (left, right):
        assert each.dtype == torch.float32
        assert ((each >= 0) & (each <= 1)).all()


@pytest.mark.parametrize("exponent", range(2, 25))
def test_both_tails_keep_their_relative_precision(exponent: int) -> None:
    """At distance d = 2^-exponent from an edge the smaller of S, 1 - S is d^2 (3 - 2 d)."""
    distance = 2.0**-exponent
    expected = torch.tensor(distance**2 * (3 - 2 * distance))
    _, right = smooth_step(torch.tensor(0.5 - distance, dtype=torch.float64).float(), 1.0)
    left, _ = smooth_step(torch.tensor(distance - 0.5, dtype=torch.float64).float(), 1.0)
    torch.testing.assert_close(right, expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(left, expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_flat_outside(dtype: torch.dtype) -> None:
    t = torch.tensor([-100.0, -0.6, -0.5, 0.5, 0.6, 100.0], dtype=dtype).requires_grad_()
    left, right = smooth_step(t, 1.0)
    assert left.tolist() == [0, 0, 0, 1, 1, 1]
    assert right.tolist() == [1, 1, 1, 0, 0, 0]
    (grad,) = torch.autograd.grad((left * 1e30 - right * 1e25).sum(), t)
    assert torch.equal(grad, torch.zeros_like(t))
