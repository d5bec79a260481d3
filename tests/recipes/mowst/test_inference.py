"""Who answers: the closed form against draws, the threshold against all of them."""

from __future__ import annotations

import pytest
import torch

from dist_moe.recipes.mowst.inference import Answers


def drawn(nodes: int, seed: int, levels: int = 10**6) -> Answers:
    """The surer the weak expert, the more often it is right; ``levels``: different confidences."""
    generator = torch.Generator().manual_seed(seed)
    confidence_N = (torch.rand(nodes, generator=generator, dtype=torch.float64) * levels).round() / levels
    weak_N, strong_N = (
        (torch.rand(nodes, generator=generator, dtype=torch.float64) < p).double() for p in (confidence_N, 0.6)
    )
    return Answers(confidence_N, weak_N, strong_N)


def test_draws_come_to_the_closed_form() -> None:
    answers, draws = drawn(500, seed=0), 400
    c, w, s = answers.confidence_N.tolist(), answers.weak_N.tolist(), answers.strong_N.tolist()
    expected = sum(a * b + (1 - a) * d for a, b, d in zip(c, w, s, strict=True)) / 500
    assert answers.expected_accuracy() == pytest.approx(expected)
    mean, deviation = answers.sampled_accuracy(draws, seed=1)
    assert abs(mean - expected) < 3 * deviation / draws**0.5
    exact = sum(a * (1 - a) * (b - d) ** 2 for a, b, d in zip(c, w, s, strict=True)) ** 0.5 / 500
    assert deviation == pytest.approx(exact, rel=0.15)
    assert answers.sampled_accuracy(draws, seed=1) == (mean, deviation)
    assert answers.sampled_accuracy(1, seed=1)[1] == 0.0


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_the_best_of_all(levels: int, tolerance: float, seed: int) -> None:
    answers = drawn(60, seed, levels)
    threshold, accuracy = answers.threshold(tolerance)

    def outcome(value: float) -> tuple[float, int]:
        asks = answers.confidence_N < value
        return float(torch.where(asks, answers.strong_N, answers.weak_N).mean()), int(asks.sum())

    every = [outcome(value) for value in (*answers.confidence_N.tolist(), 0.0, 2.0)]
    best = max(right for right, _ in every)
    fewest = min(asked for right, asked in every if right >= best - tolerance - 1e-12)
    assert outcome(threshold)[1] == fewest
    assert outcome(threshold)[0] == pytest.approx(accuracy)
    assert accuracy >= best - tolerance - 1e-9


def test_an_expert_that_is_always_right_is_asked_alone() -> None:
    ones, zeros, c_N = torch.ones(4).double(), torch.zeros(4).double(), torch.tensor([0.1, 0.1, 0.9, 1.0]).double()
    assert Answers(c_N, ones, zeros).threshold() == (0.0, 1.0)
    assert Answers(c_N, zeros, ones).threshold() == (2.0, 1.0)
