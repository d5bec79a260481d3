"""Areas under ROC curves, exact: of all rows (AUC), and averaged over groups such as users (GAUC)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def area_under_curve(score_N: Floats, positive_N: Flags, weight_N: NDArray[np.floating] | None = None) -> float:
    """Return the exact area under the ROC curve, ties counted half; nan if only one class occurs.

    ``weight_N``: how often each row counts, all once by default: the area is the share of the pairs of a positive and
    a negative row in which the positive one scores higher, a pair counting with the product of its rows' weights.
    """
    weights = np.ones(len(score_N)) if weight_N is None else np.asarray(weight_N, dtype=np.float64)
    won_G, pairs_G, _ = _pairs_won(score_N, positive_N, weights, np.zeros(len(score_N), dtype=np.int64))
    return float(won_G[0] / pairs_G[0]) if pairs_G.any() else float("nan")


def grouped_area_under_curve(
    score_N: Floats, positive_N: Flags, weight_N: NDArray[np.floating], group_N: NDArray[np.integer]
) -> float:
    """Return sum(rows of g x AUC of g) / sum(rows of g) over the groups g that have both classes; nan if none has.

    It is the GAUC of Zhu et al. (Deep Interest Network, arXiv 1706.06978, 2017), there over users and their
    impressions. A row counts ``weight_N`` times, among the rows of its group too; rows of group -1 have no group.
    """
    known_N = group_N >= 0
    score_N, positive_N, weight_N, group_N = score_N[known_N], positive_N[known_N], weight_N[known_N], group_N[known_N]
    won_G, pairs_G, rows_G = _pairs_won(score_N, positive_N, weight_N.astype(np.float64), group_N)
    both_G = pairs_G > 0
    total = rows_G[both_G].sum()
    return float((rows_G[both_G] * won_G[both_G] / pairs_G[both_G]).sum() / total) if total else float("nan")


def _pairs_won(
    score_N: Floats, positive_N: Flags, weight_N: Floats, group_N: NDArray[np.integer]
) -> tuple[Floats, Floats, Floats]:
    """Return (G,) weights per group, in order: of the pairs won, of all pairs, and of the rows. nan for a nan score.

    With whole weights all sums are exact as long as they are below 2^52.
    """
    order_N = np.lexsort((score_N, group_N))
    score_N, group_N, weight_N, positive_N = score_N[order_N], group_N[order_N], weight_N[order_N], positive_N[order_N]
    starts_group_N = _starts(group_N)
    tie_T = np.flatnonzero(starts_group_N | _starts(score_N))  # where rows of one group and score begin
    group_G = np.flatnonzero(starts_group_N[tie_T])  # where groups begin among these
    positive_T = np.add.reduceat(np.where(positive_N, weight_N, 0.0), tie_T)
    negative_T = np.add.reduceat(np.where(positive_N, 0.0, weight_N), tie_T)
    before_T = np.cumsum(negative_T) - negative_T
    below_T = before_T - np.repeat(before_T[group_G], np.diff(group_G, append=len(tie_T)))
    won_T = np.where(np.isnan(score_N[tie_T]), np.nan, positive_T * (below_T + negative_T / 2))
    won_G, positives_G, negatives_G = (np.add.reduceat(x_T, group_G) for x_T in (won_T, positive_T, negative_T))
    return won_G, positives_G * negatives_G, positives_G + negatives_G


def _starts(value_N: NDArray[np.generic]) -> Flags:
    """Return where a value differs from the one before it; the first one does."""
    return np.concatenate([np.ones(min(len(value_N), 1), dtype=bool), value_N[1:] != value_N[:-1]])
