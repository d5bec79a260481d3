"""dropout: how much it drops, what it keeps, and its gradient."""

from __future__ import annotations

import pytest
import torch

from dist_moe.kernels import dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_drops_the_share_and_scales_the_rest(probability: float) -> None:
    torch.manual_seed(0)
    count = 200_001
    x = torch.ones(count, requires_grad=True)
    y = dropout(x, probability, training=True)
    kept = y > 0
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert abs(1 - kept.float().mean().item() - probability) < 5 * deviation
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - probability)), rtol=1e-4, atol=0)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach())


def test_elements_are_dropped_independently() -> None:
    torch.manual_seed(1)
    kept = (dropout(torch.ones(4, 100_000).t().contiguous(), 0.5, training=True) > 0).double()
    correlation = torch.corrcoef(kept.t())
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def test_follows_the_seed_and_draws_anew() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout(torch.ones(1000), 0.5, training=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("probability", "training"), [(0.5, False), (0.0, True), (1e-9, True)])
def test_nothing_is_dropped(probability: float, training: bool) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(dropout(x, probability, training), x)


def test_any_shape_and_no_rows() -> None:
    for shape in [(0, 4), (1, 1), (3, 7)]:
        assert dropout(torch.ones(shape), 0.5, training=True).shape == shape
