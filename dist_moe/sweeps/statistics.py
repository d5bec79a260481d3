"""The COMET paper's way to report a random search, and the budget curve. N trials of one row throughout.

Selection is by validation loss alone; a trial with nan or inf there diverged, and comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOW, HIGH = 0.05, 0.95


LEVEL = 0.95
"""Level of intervals, and of spreads over resamples; the bands of budget curves are from LOW to HIGH."""
RESAMPLES = 2000


@dataclass(frozen=True)
class BudgetCurve:
    """Expectations of a search of b trials, for each b in ``budgets``: of the test loss of the trial that it
    would choose, the mean (``expected``) and the 5 % and 95 % quantiles over resamples (``low``, ``high``)."""

    budgets: Ints
    expected: Floats
    low: Floats
    high: Floats


def best_trials(val_N: ArrayLike, fraction: float) -> Ints:
    """Return the ceil(fraction * N) trials of the least validation loss, best first; of equals the earlier first.

    Raises ValueError for no trials, or a fraction outside (0, 1].
    """
    val = _losses(val_N)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    # 0.05 * 60 is 3.0000000000000004 in floating point, and means 3.
    count = math.ceil(round(fraction * len(val), 9))
    return np.argsort(val, kind="stable")[: max(count, 1)]


def best_spread(
    val_N: ArrayLike, test_N: ArrayLike, fraction: float, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return between which values the share LEVEL of resamples have the mean test loss of their best trials.

    The best are chosen anew among N trials drawn with replacement, so the choice is in it. It is less than the spread
    of other searches of N trials, as nothing better than the best of these can be drawn: with normal losses and a
    twentieth averaged, about half of other searches lie in it at N = 12, 85 % at N = 500.
    """
    val, test = _alike(val_N, test_N)
    count = len(best_trials(val, fraction))
    drawn_RN = np.random.default_rng(seed).integers(len(val), size=(resamples, len(val)))
    best_RM = np.argsort(val[drawn_RN], axis=1, kind="stable")[:, :count]
    mean_R = test[np.take_along_axis(drawn_RN, best_RM, axis=1)].mean(axis=1)
    low, high = np.quantile(mean_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def chosen_again(val_DS: Floats, test_DS: Floats, drawn_RD: Ints, share_RS: Floats) -> Floats:
    """Return (R,) mean test losses over seeds, each of the draw chosen in another search.

    D draws, each trained with S seeds. Search r has the draws ``drawn_RD[r]``, repeated ones among them, and takes the
    one with the least validation loss under the weights ``share_RS[r]`` of seeds; of equals the first. A draw that has
    nan or inf in validation is taken where there is no other. Test losses that are not finite count as the worst that
    is, as do those of such a draw.
    """
    worst = test_DS[np.isfinite(test_DS)].max()
    whole_D1 = np.asarray(np.isfinite(val_DS).all(axis=1))[:, None]
    val_RD = np.where(whole_D1.T, share_RS @ np.where(whole_D1, val_DS, 0).T, np.inf)
    test_RD = share_RS @ np.where(whole_D1 & np.isfinite(test_DS), test_DS, worst).T
    place_R1 = np.take_along_axis(val_RD, drawn_RD, axis=1).argmin(axis=1, keepdims=True)
    chosen_R1 = np.take_along_axis(drawn_RD, place_R1, axis=1)
    return np.take_along_axis(test_RD, chosen_R1, axis=1)[:, 0]


def budget_curve(
    val_N: ArrayLike, test_N: ArrayLike, budgets: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> BudgetCurve:
    """Return the curve by bootstrap: draw b of N trials with replacement, take the test loss of the best by validation.

    The resamples of a smaller budget are the beginnings of those of a larger one. Among drawn trials with
    equal validation loss the first drawn wins. Raises ValueError for budgets below 1 or no resamples.
    """
    val, test = _alike(val_N, test_N)
    budgets_B = _budgets(budgets)
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    longest = int(budgets_B.max())
    drawn_RB = np.random.default_rng(seed).integers(len(val), size=(resamples, longest))
    rank_N = np.unique(val, return_inverse=True)[1]
    # One number orders draws by rank, then by when they were drawn; its running minimum is the winner so far.
    order_RB = rank_N[drawn_RB] * longest + np.arange(longest)
    winner_RB = np.minimum.accumulate(order_RB, axis=1)[:, budgets_B - 1] % longest
    outcome_RB = test[np.take_along_axis(drawn_RB, winner_RB, axis=1)]
    low, high = np.quantile(outcome_RB, [LOW, HIGH], axis=0)
    return BudgetCurve(budgets_B, outcome_RB.mean(axis=0), low, high)


def expected_best(val_N: ArrayLike, test_N: ArrayLike, budgets: Sequence[int]) -> Floats:
    """Return the expectation that ``budget_curve`` estimates, in closed form.

    With c(r) of N trials of rank r or worse, the best of b draws has rank r with probability
    (c(r) / N)^b - (c(r+1) / N)^b; trials of equal validation loss are equally likely to be it.
    """
    val, test = _alike(val_N, test_N)
    _, rank_N, size_U = np.unique(val, return_inverse=True, return_counts=True)
    mean_U = np.bincount(rank_N, weights=test) / size_U
    at_least_U = np.append(np.cumsum(size_U[::-1])[::-1], 0) / len(val)
    tail_BU = at_least_U ** _budgets(budgets)[:, None]
    return (tail_BU[:, :-1] - tail_BU[:, 1:]) @ mean_U


def budget_to_reach(curve: BudgetCurve, level: float) -> int | None:
    """Return the least budget at which the expected test loss is at most ``level``; None if no budget reaches it.

    With the level that another row reaches at its full budget, this is the paper's "x times fewer trials".
    """
    reached = np.flatnonzero(curve.expected <= level)
    return int(curve.budgets[reached[0]]) if len(reached) else None


def with_bounded_losses(val_N: ArrayLike, test_N: ArrayLike) -> tuple[Floats, Floats]:
    """Return losses for budget curves: a trial that diverged keeps the last rank, with the worst finite test loss.

    Any chance, however small, of drawing only such trials would else make the expectation infinite.
    Raises ValueError if no trial has a finite test loss.
    """
    val, test = _alike(val_N, test_N)
    if not np.isfinite(test).any():
        raise ValueError("no trial has a finite test loss")
    worst = test[np.isfinite(test)].max()
    return val, np.where(np.isfinite(val) & np.isfinite(test), test, worst)


def _losses(val_N: ArrayLike) -> Floats:
    val = np.asarray(val_N, dtype=np.float64)
    if val.ndim != 1 or len(val) == 0:
        raise ValueError(f"expected the losses of at least one trial, got an array of shape {val.shape}")
    return np.where(np.isfinite(val), val, np.inf)


def _alike(val_N: ArrayLike, test_N: ArrayLike) -> tuple[Floats, Floats]:
    val, test = _losses(val_N), np.asarray(test_N, dtype=np.float64)
    if val.shape != test.shape:
        raise ValueError(f"validation and test metrics differ in number: {val.shape} and {test.shape}")
    return val, test


def _budgets(budgets: Sequence[int]) -> Ints:
    budgets_B = np.asarray(budgets, dtype=np.int64)
    if len(budgets_B) == 0 or budgets_B.min() < 1:
        raise ValueError(f"budgets must be at least one number of trials, each positive, got {list(budgets)}")
    return budgets_B
