"""From the logits of where answers start and end to the loss of windows and the answers to questions.

The rule is SQuAD v2's (Rajpurkar, Jia and Liang 2018; Devlin et al. 2019, 4.3) with the threshold 0. A span scores the
sum of its two logits, none scores that of [CLS]. A question is answered by the best span of its windows, unless
[CLS] scores more in each of them: the least of its scores counts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NO_WINDOW = -1


def span_losses(start_BS: Tensor, end_BS: Tensor, span_B2: Tensor) -> Tensor:
    """Return (B,): the mean of the cross-entropies of the first and of the last token of the answer."""
    losses = [
        F.cross_entropy(logits_BS, label_B, reduction="none")
        for logits_BS, label_B in zip((start_BS, end_BS), span_B2.unbind(1), strict=True)
    ]
    return torch.stack(losses).mean(dim=0)


def best_spans(start_BS: Tensor, end_BS: Tensor, text_BS: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each window's best span: its score, -inf if there is none, and its first and last token; (B,) each.

    ``text_BS``: bool, the tokens of which a span may consist; they are neighbours. ``longest``: tokens of a span,
    at most. Of equal scores a shorter span wins.
    """
    outside = -torch.inf
    start_BS, end_BS = (logits_BS.masked_fill(~text_BS, outside) for logits_BS in (start_BS, end_BS))
    score_B = start_BS.new_full((len(start_BS),), outside)
    first_B, last_B = (torch.zeros(len(start_BS), dtype=torch.int64, device=start_BS.device) for _ in range(2))
    width = start_BS.shape[1]
    for more in range(min(longest, width)):
        of_length_B, begin_B = (start_BS[:, : width - more] + end_BS[:, more:]).max(dim=1)
        better_B = of_length_B > score_B
        score_B = torch.where(better_B, of_length_B, score_B)
        first_B = torch.where(better_B, begin_B, first_B)
        last_B = torch.where(better_B, begin_B + more, last_B)
    return score_B, first_B, last_B


def answering_windows(
    question_N: NDArray[np.int64], none_N: NDArray[np.float64], score_N: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return (Q,): the window whose best span answers each question; `NO_WINDOW` where none does.

    ``question_N``: the question of each of N windows, 0 to Q - 1, each with one or more. ``none_N``, ``score_N``: the
    scores of [CLS] and of the best span.
    """
    ranked_N = np.lexsort((-score_N, question_N))  # stable: of equal scores the earlier window comes first
    _, first_Q = np.unique(question_N[ranked_N], return_index=True)
    window_Q = ranked_N[first_Q]
    none_Q = np.full(len(first_Q), np.inf)
    np.minimum.at(none_Q, question_N, none_N)
    return np.where(none_Q > score_N[window_Q], NO_WINDOW, window_Q)
