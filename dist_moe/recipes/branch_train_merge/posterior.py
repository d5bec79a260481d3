"""Mix the predictions of experts by the posterior of their domains (Li et al., Branch-Train-Merge, 2022, section 3.2).

Expert j was trained on domain D = j. Its probability of the next token counts by how likely the domain is, given what
came before:

    p(x_t | x_<t) = sum_j  w_jt  p(x_t | x_<t, D=j)        a mixture of probabilities, not of logits
    w_jt = p(D=j | x_<t)  ~  prior_j  prod_{s<t} p(x_s | x_<s, D=j)

All of it is computed from log-probabilities, in fp64. J experts, B sequences, S targets; before the first target
nothing was seen, so there the weights are the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

History = Literal["all", "previous"]
"""How much of the past decides: ``all`` of the sequence as the formula says, or the ``previous`` token alone, as the
scorer that was released with the paper's successor computes it."""


@dataclass(frozen=True)
class PriorOptions:
    """How a domain's prior is estimated: from so many ``sequences``, each moving it by ``decay``; ``seed`` of the draw
    of the sequences."""

    sequences: int = 100
    decay: float = 0.3
    seed: int = 0


def log_weights(logp_JBS: Tensor, prior_J: Tensor, history: History = "all") -> Tensor:
    """Return (J, B, S) log w_jt, fp64: log-posteriors of the domains before each target.

    ``logp_JBS``: log p(x_t | x_<t, D=j) of the targets. ``prior_J``: sums to 1; an expert of prior 0 has weight 0.
    """
    logp_JBS = logp_JBS.double()
    seen_JBS = logp_JBS.cumsum(dim=2) if history == "all" else logp_JBS
    seen_JBS = F.pad(seen_JBS[:, :, :-1], (1, 0))  # a target's own probability must not decide its weight
    return (prior_J.to(logp_JBS).log()[:, None, None] + seen_JBS).log_softmax(dim=0)


def log_mixture(log_weight_JBS: Tensor, logp_JBS: Tensor) -> Tensor:
    """Return (B, S) log sum_j w_jt p_jt, fp64; further axes of ``logp_JBS`` (a vocabulary) stay."""
    logp_JBS = logp_JBS.double()
    extra = (1,) * (logp_JBS.dim() - log_weight_JBS.dim())
    return (log_weight_JBS.reshape(*log_weight_JBS.shape, *extra) + logp_JBS).logsumexp(dim=0)


def log_predictions(logp_JBSV: Tensor, token_BS: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return (B, S, V) log-probabilities of the token after each one, fp64, from those of each expert.

    ``weigh``: ((J, B, S) log-probabilities of targets, (B, S) tokens before them) -> log-weights before each target.
    """
    # The target after the last token is not known, and no weight depends on it.
    target_BS = torch.cat([token_BS[:, 1:], token_BS[:, :1]], dim=1)
    logp_JBS = logp_JBSV.gather(3, target_BS.expand(len(logp_JBSV), -1, -1).unsqueeze(3)).squeeze(3)
    return log_mixture(weigh(logp_JBS, token_BS), logp_JBSV)


def uniform_prior(experts: int) -> Tensor:
    """Return (J,) equal shares, fp64."""
    return torch.full((experts,), 1 / experts, dtype=torch.float64)


def cached_prior(sequences: Iterable[Tensor], experts: int, decay: float, history: History = "all") -> Tensor:
    """Return (J,) fp64: the prior after ``sequences`` of (J, S) target log-probabilities, one after the other.

    Each sequence's posterior, averaged over its targets, moves the prior, with which the next one begins:
    prior <- (1 - decay) prior + decay posterior, the first posterior whole. Without sequences it is uniform.
    """
    prior_J, seen = uniform_prior(experts), False
    for logp_JS in sequences:
        mean_J = log_weights(logp_JS[:, None], prior_J, history).exp().mean(dim=(1, 2))
        prior_J = (1 - decay) * prior_J + decay * mean_J if seen else mean_J
        seen = True
    return prior_J


def top_k(prior_J: Tensor, k: int | None) -> Tensor:
    """Return the prior with its ``k`` largest entries alone (the first of equal ones), which sum to 1; None: all."""
    if k is None or k >= len(prior_J):
        return prior_J
    kept_K = prior_J.argsort(descending=True, stable=True)[:k]
    return torch.zeros_like(prior_J).index_copy(0, kept_K, prior_J[kept_K] / prior_J[kept_K].sum())
