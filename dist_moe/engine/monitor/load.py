"""Numbers about the load of experts: how many really work, how evenly, and for how many each token asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
"""The quantiles of experts per token that a record has, by the ends of their names."""

HISTOGRAM = "tokens_by_active_experts"
"""The name under which a step's tokens are summed by their number of experts, over gates and layers."""


def effective_experts(load: ArrayLike) -> NDArray[np.float64]:
    """Return exp(entropy of the shares) of loads (..., E) >= 0: E for an even load, 1 if one has all, 0 without any.

    Raises ValueError for loads that have no axis.
    """
    load = np.asarray(load, dtype=np.float64)
    if load.ndim == 0:
        raise ValueError("load: needs an axis of experts, got a single number")
    total = load.sum(axis=-1, keepdims=True)
    share = load / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def describe_load(records: Sequence[dict[str, Any]], experts: Sequence[int]) -> None:
    """Add to the records of a window what their ``load`` says; cut it to the experts that each layer has.

    ``experts``: of each MoE layer of the model. Added, of the step's rows: ``effective_experts``, the mean over layers,
    and ``effective_experts_least``, that of the worst layer; ``dead_experts``, those without any row, in all layers;
    ``load_cv`` and ``load_max_over_mean``, standard deviation and largest load of a layer's experts over their mean,
    of the worst layer; and, from the histogram of experts per token, which is dropped, ``active_experts_p10``,
    ``_p50``, ``_p90`` and ``_max``. A record without load gets nothing.
    """
    for record in records:
        tokens_C = np.asarray(record.pop(HISTOGRAM, ()))
        if tokens_C.sum():
            below_C = tokens_C.cumsum() / tokens_C.sum()
            for name, quantile in QUANTILES.items():
                record[f"active_experts_{name}"] = float(np.searchsorted(below_C, quantile - 1e-12))
    if not records or not len(records[0].get("load", ())):
        return
    load_WLE = np.asarray([record["load"] for record in records], dtype=np.float64)
    layers, width = load_WLE.shape[1:]
    experts_L = np.asarray(experts if len(experts) == layers else [width] * layers)
    mean_WL = load_WLE.sum(axis=2) / experts_L
    variance_WL = np.square(load_WLE).sum(axis=2) / experts_L - np.square(mean_WL)
    positive_WL = np.where(mean_WL > 0, mean_WL, np.inf)  # an idle layer is even
    effective_WL = effective_experts(load_WLE)
    columns = {
        "effective_experts": effective_WL.mean(axis=1),
        "effective_experts_least": effective_WL.min(axis=1),
        "dead_experts": ((load_WLE == 0).sum(axis=2) - (width - experts_L)).sum(axis=1).astype(np.float64),
        "load_cv": (np.sqrt(variance_WL.clip(min=0)) / positive_WL).max(axis=1),
        "load_max_over_mean": (load_WLE.max(axis=2) / positive_WL).max(axis=1),
    }
    for i, record in enumerate(records):
        record |= {name: float(column[i]) for name, column in columns.items()}
        if (experts_L < width).any():
            record["load"] = [load_E[:count] for load_E, count in zip(record["load"], experts_L, strict=True)]
