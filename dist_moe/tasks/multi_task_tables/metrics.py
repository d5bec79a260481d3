"""Metrics of predictions of a table's targets, each over the rows that are labelled for it, exact over the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.tables import RowTable, Target
from dist_moe.tasks.ranking_metrics import Flags, Floats, area_under_curve, grouped_area_under_curve
from dist_moe.tasks.task import Columns, Metrics

CALIBRATION_BINS = 20
LOSSES = {"binary": "log_loss", "numeric": "mse"}
"""Metrics that are trained, by the kind of target."""

MEANS = ("auc", "gauc", "log_loss", "ne", "mse")
"""Metrics whose mean over the targets that have a value is a metric too."""


@dataclass(frozen=True)
class Labels:
    """The R rows of a part of N that count for one target: those labelled for it whose weight is above 0.

    ``rows_N``: which they are. ``label_R``: 0 or 1 of a binary target. ``group_R``: -1 without a group.
    """

    target: Target
    rows_N: Flags
    label_R: Floats
    weight_R: Floats
    group_R: NDArray[np.int64]

    @property
    def has_groups(self) -> bool:
        """Whether any row has a group."""
        return bool((self.group_R >= 0).any())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics that predictions have."""
        if self.target.kind == "numeric":
            return ("mse",)
        return ("auc", *(("gauc",) if self.has_groups else ()), "log_loss", "ne", "calibration", "ece")

    @cached_property
    def mean(self) -> float:
        """The weighted mean of the labels, of a binary target the base rate; nan without rows."""
        return _mean(self.label_R, self.weight_R)

    def metrics(self, predicted_N: Floats) -> Metrics:
        """Return the metrics of predictions for all rows of the part (of a binary target: logits).

        ``ne``: normalised entropy, the log loss divided by that of the rows' own base rate for all of them (He et al.,
        Practical Lessons from Predicting Clicks on Ads at Facebook, 2014). ``calibration``: the expected number of
        positive rows divided by the observed one (ibid.). ``ece``: expected calibration error, the mean over bins of
        |mean probability - share of positive rows| (Naeini et al., 2015), here with bins of equal weight.
        """
        from scipy.special import expit, xlogy

        predicted_R = predicted_N[self.rows_N]
        if self.target.kind == "numeric":
            return {"mse": _mean((predicted_R - self.label_R) ** 2, self.weight_R)}
        positive_R, p = self.label_R > 0, self.mean
        log_loss = _mean(np.logaddexp(0.0, np.where(positive_R, -predicted_R, predicted_R)), self.weight_R)
        entropy = -float(xlogy(p, p) + xlogy(1 - p, 1 - p))
        probability_C, share_C, weight_C = calibration_bins(predicted_R, self.label_R, self.weight_R)
        metrics = {"auc": area_under_curve(predicted_R, positive_R, self.weight_R)}
        if self.has_groups:
            metrics["gauc"] = grouped_area_under_curve(predicted_R, positive_R, self.weight_R, self.group_R)
        return metrics | {
            "log_loss": log_loss,
            "ne": log_loss / entropy if entropy else float("nan"),
            "calibration": _mean(expit(predicted_R), self.weight_R) / p if p else float("nan"),
            "ece": _mean(np.abs(probability_C - share_C), weight_C),
        }

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Why metrics have no value on these rows, by their names."""
        name, is_binary = self.target.name, self.target.kind == "binary"
        if not len(self.label_R):
            return dict.fromkeys(self.names, f"no row is labelled with {name}")
        if not is_binary:
            return {}
        if self.mean in (0, 1):
            names = {"auc", "gauc", "ne", *([] if self.mean else ["calibration"])} & {*self.names}
            return dict.fromkeys(sorted(names), f"one class only, {name} is {self.mean:g} in all rows")
        positive_R = self.label_R > 0
        in_group_R = self.group_R >= 0
        both = np.intersect1d(self.group_R[positive_R & in_group_R], self.group_R[~positive_R & in_group_R])
        if self.has_groups and not len(both):
            return {"gauc": f"no group has both classes of {name}"}
        return {}


def labels_of(part: RowTable, targets: Sequence[Target]) -> list[Labels]:
    """Return what counts in ``part`` for each target."""
    weight_N, group_N = np.asarray(part.weight_N), np.asarray(part.group_N)
    labels = []
    for target, label_N in zip(targets, np.asarray(part.target_NT).T, strict=True):
        rows_N = ~np.isnan(label_N) & (weight_N > 0)
        label_R, weight_R = label_N[rows_N].astype(np.float64), weight_N[rows_N].astype(np.float64)
        labels.append(Labels(target, rows_N, label_R, weight_R, group_N[rows_N]))
    return labels


def table_metrics(columns_TN: Columns, labels: Sequence[Labels], weights: tuple[float, ...]) -> Metrics:
    """Return METRIC for the mean over targets, METRIC_TARGET for each, and ``loss``.

    That is the sum over targets of their weights times their losses: the log loss of a binary target, the squared error
    of a numeric one; 0 where no row is labelled.
    """
    by_target = [one.metrics(column_N) for one, column_N in zip(labels, columns_TN, strict=True)]
    means: Metrics = {}
    for name in MEANS:
        pairs = [(one, metrics[name]) for one, metrics in zip(labels, by_target, strict=True) if name in metrics]
        known = [value for one, value in pairs if name not in one.undefined]
        if pairs:
            means[name] = float(np.mean(known)) if known else float("nan")
    terms = [
        weight * metrics[LOSSES[one.target.kind]]
        for weight, one, metrics in zip(weights, labels, by_target, strict=True)
        if weight and len(one.label_R)
    ]
    named = zip(labels, by_target, strict=True)
    each = {f"{name}_{one.target.name}": value for one, metrics in named for name, value in metrics.items()}
    return means | each | {"loss": float(sum(terms))}


def table_undefined(labels: Sequence[Labels], weights: tuple[float, ...]) -> dict[str, str]:
    """Return why metrics have no value, by their names in :func:`table_metrics`: of targets, and of means."""
    reasons = {f"{name}_{one.target.name}": why for one in labels for name, why in one.undefined.items()}
    for name in MEANS:
        having = [one for one in labels if name in one.names]
        if having and all(name in one.undefined for one in having):
            reasons[name] = having[0].undefined[name]
    if not any(weight and len(one.label_R) for weight, one in zip(weights, labels, strict=True)):
        reasons["loss"] = "no row is labelled with a target whose weight is above 0"
    return reasons


def constant_columns(train: Sequence[Labels], rows: int) -> Columns:
    """Return (T, rows) predictions that are alike for all rows: the training rows' mean, of a binary target its logit.

    Without training rows they are 0; a base rate of 0 or 1 is taken as half a row of the other class.
    """
    from scipy.special import logit

    values = []
    for one in train:
        mean = 0.0 if math.isnan(one.mean) else one.mean
        if one.target.kind == "binary":
            half = 0.5 / max(len(one.label_R), 1)
            mean = float(logit(np.clip(mean, half, 1 - half)))
        values.append(mean)
    return np.repeat(np.array(values)[:, None], rows, axis=1)


def calibration_bins(logit_R: Floats, label_R: Floats, weight_R: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (bins,) mean probability, share of positive rows, and weight, of about equally heavy bins.

    Rows are in order of their logits; those with equal ones share a bin, so that there may be fewer bins.
    """
    from scipy.special import expit

    logit_U, index_R = np.unique(logit_R, return_inverse=True)
    weight_U = np.bincount(index_R, weights=weight_R)
    middle_U = np.cumsum(weight_U) - weight_U / 2
    bin_U = (middle_U / weight_U.sum() * CALIBRATION_BINS).astype(np.int64)
    positive_U = np.bincount(index_R, weights=weight_R * label_R)
    sums = [np.bincount(bin_U, weights=x_U) for x_U in (weight_U * expit(logit_U), positive_U, weight_U)]
    probability_C, share_C, weight_C = np.stack(sums)[:, sums[-1] > 0]
    return probability_C / weight_C, share_C / weight_C, weight_C


def _mean(value_R: Floats, weight_R: Floats) -> float:
    return float(np.average(value_R, weights=weight_R)) if len(value_R) else float("nan")
