"""The mixture of experts by the posterior of their domains: against brute force in fp64, and identities."""

from __future__ import annotations

import importlib.util
import math
from itertools import product

import pytest
import torch
from torch import Tensor

from dist_moe.recipes.branch_train_merge.posterior import (
    History,
    cached_prior,
    log_mixture,
    log_weights,
    top_k,
    uniform_prior,
)

J, B, S, V = 3, 2, 7, 5
HISTORIES: tuple[History, ...] = ("all", "previous")


def drawn(seed: int = 0, experts: int = J, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(J, B, S, V) log-probabilities of a vocabulary, those of (B, S) drawn targets, and a prior."""
    generator = torch.Generator().manual_seed(seed)
    logp_JBSV = (scale * torch.randn(experts, B, S, V, generator=generator, dtype=torch.float64)).log_softmax(-1)
    target_BS = torch.randint(V, (B, S), generator=generator)
    logp_JBS = logp_JBSV.gather(3, target_BS.expand(experts, -1, -1).unsqueeze(3)).squeeze(3)
    return logp_JBSV, logp_JBS, torch.rand(experts, generator=generator, dtype=torch.float64).softmax(0)


def naive_weight(logp_JBS: Tensor, prior_J: Tensor, b: int, t: int, history: History) -> list[float]:
    """Bayes' rule by products of probabilities, one expert and one token after the other."""
    joint = []
    for j in range(len(prior_J)):
        value = float(prior_J[j])
        for s in range(t) if history == "all" else range(max(t - 1, 0), t):
            value *= math.exp(float(logp_JBS[j, b, s]))
        joint.append(value)
    return [value / sum(joint) for value in joint]


@pytest.mark.parametrize("history", HISTORIES)
def test_weights_and_mixture_are_those_of_bayes_rule(history: History) -> None:
    logp_JBSV, logp_JBS, prior_J = drawn()
    weight_JBS = log_weights(logp_JBS, prior_J, history).exp()
    mixed_BSV = log_mixture(weight_JBS.log(), logp_JBSV)
    for b, t in product(range(B), range(S)):
        expected_J = torch.tensor(naive_weight(logp_JBS, prior_J, b, t, history), dtype=torch.float64)
        torch.testing.assert_close(weight_JBS[:, b, t], expected_J, rtol=1e-12, atol=0)
        naive_V = sum(w * logp_JBSV[j, b, t].exp() for j, w in enumerate(expected_J))
        torch.testing.assert_close(mixed_BSV[b, t].exp(), naive_V, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixed_BSV.exp().sum(-1), torch.ones(B, S, dtype=torch.float64), rtol=1e-12, atol=0)
    assert weight_JBS[:, :, 0].allclose(prior_J[:, None], rtol=1e-12, atol=0)  # nothing was seen yet


def test_the_two_histories_differ() -> None:
    _, logp_JBS, prior_J = drawn(scale=2.0)
    whole, previous = (log_weights(logp_JBS, prior_J, history).exp() for history in HISTORIES)
    assert whole[:, :, :2].allclose(previous[:, :, :2])
    assert (whole[:, :, 2:] - previous[:, :, 2:]).abs().max() > 0.1


@pytest.mark.parametrize("history", HISTORIES)
def test_no_target_decides_a_weight_before_it(history: History) -> None:
    _, logp_JBS, prior_J = drawn()
    before = log_weights(logp_JBS, prior_J, history)
    for t in range(S):
        changed = logp_JBS.clone()
        changed[0, :, t] -= 3.0
        after = log_weights(changed, prior_J, history)
        assert after[:, :, : t + 1].equal(before[:, :, : t + 1])
        if t + 1 < S:
            assert not after[:, :, t + 1].equal(before[:, :, t + 1])


def test_exact_identities() -> None:
    logp_JBSV, logp_JBS, prior_J = drawn()
    alone = log_mixture(log_weights(logp_JBS[:1], torch.ones(1)), logp_JBSV[:1])
    assert alone.equal(logp_JBSV[0])
    copies = logp_JBSV[:1].expand(J, -1, -1, -1)
    same = log_mixture(log_weights(logp_JBS, prior_J), copies)  # whatever the weights are
    torch.testing.assert_close(same, logp_JBSV[0], rtol=1e-13, atol=1e-13)
    for j in range(J):
        one_hot_J = torch.nn.functional.one_hot(torch.tensor(j), J).double()
        assert log_mixture(log_weights(logp_JBS, one_hot_J), logp_JBSV).equal(logp_JBSV[j])


def test_long_sequences_of_unlikely_tokens_do_not_underflow() -> None:
    logp_JBS = torch.full((2, 1, 20_000), -60.0, dtype=torch.float64)
    logp_JBS[1] -= 1e-4
    last_J = log_weights(logp_JBS, uniform_prior(2))[:, 0, -1]
    ahead = 19_999 * 1e-4
    expected_J = -torch.tensor([-ahead, ahead], dtype=torch.float64).exp().log1p()
    torch.testing.assert_close(last_J, expected_J, rtol=1e-6, atol=0)  # sums of a million nats


@pytest.mark.parametrize("history", HISTORIES)
def test_cached_prior_is_an_exponential_average(history: History) -> None:
    sequences = [drawn(seed)[1][:, 0] for seed in range(9)]
    found_J = cached_prior(sequences, J, 0.3, history)
    prior_J, posteriors = uniform_prior(J), []
    for logp_JS in sequences:
        weights = [naive_weight(logp_JS[:, None], prior_J, 0, t, history) for t in range(S)]
        posteriors.append(torch.tensor(weights, dtype=torch.float64).mean(dim=0))
        prior_J = posteriors[0] if len(posteriors) == 1 else 0.7 * prior_J + 0.3 * posteriors[-1]
    # Written out: the last posterior counts 0.3, the one before 0.3 * 0.7, ..., the first all that is left.
    n = len(posteriors)
    share_n = [0.7 ** (n - 1), *(0.3 * 0.7 ** (n - 1 - i) for i in range(1, n))]
    assert sum(share_n) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(
        found_J, sum(w * p for w, p in zip(share_n, posteriors, strict=True)), rtol=1e-12, atol=0
    )
    assert float(found_J.sum()) == pytest.approx(1, abs=1e-12)
    if importlib.util.find_spec("pandas"):
        pandas = importlib.import_module("pandas")
        rows = pandas.DataFrame([p.tolist() for p in posteriors]).ewm(alpha=0.3, adjust=False).mean()
        torch.testing.assert_close(found_J, torch.tensor(rows.iloc[-1].to_numpy()), rtol=1e-12, atol=0)


def test_without_sequences_the_prior_is_uniform() -> None:
    assert cached_prior([], 4, 0.3).tolist() == [0.25] * 4


def test_top_k_keeps_the_largest_and_sums_to_1() -> None:
    prior_J = torch.tensor([0.1, 0.4, 0.1, 0.4], dtype=torch.float64)
    assert top_k(prior_J, None) is prior_J
    assert top_k(prior_J, 4) is prior_J
    assert top_k(prior_J, 1).tolist() == [0, 1, 0, 0]
    assert top_k(prior_J, 3).tolist() == pytest.approx([1 / 9, 4 / 9, 0, 4 / 9])
