"""A picture of a confidence: how often the weak and the strong expert are right, by its deciles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.tasks.task import Columns, Watch

_WEAK_RIGHT, _STRONG_RIGHT, _CONFIDENCE = 3, 5, 6


class ConfidenceWatch(Watch):
    """Adds ``deciles`` to the metrics of a weak and a strong expert."""

    def end(self, columns: Columns, part: Any) -> dict[str, Any]:
        """Return ``deciles``; nothing for a model of one network."""
        return {"deciles": deciles(columns)} if len(columns) > _CONFIDENCE else {}


def deciles(columns: Columns, count: int = 10) -> list[dict[str, float]]:
    """Return ``confidence`` and the accuracies ``weak`` and ``strong`` of equal groups of nodes, the least sure first.

    ``columns``: as :class:`~dist_moe.tasks.graphs.task.NodeClassificationTask` observes them, (7, N).
    """
    groups = np.array_split(np.argsort(columns[_CONFIDENCE], kind="stable"), count)
    rows = {"confidence": _CONFIDENCE, "weak": _WEAK_RIGHT, "strong": _STRONG_RIGHT}
    return [{name: float(columns[i, group].mean()) for name, i in rows.items()} for group in groups if len(group)]


def draw_deciles(path: Path, groups: Sequence[Mapping[str, float]]) -> None:
    """Draw both accuracies and the confidence over the deciles. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="decile of the confidence", ylabel="accuracy, mean confidence", ylim=(0, 1.02))
    place = np.arange(1, len(groups) + 1)
    for name, style in (("weak", "o-"), ("strong", "s-"), ("confidence", ":")):
        axes.plot(place, [group[name] for group in groups], style, label=name)
    axes.set_xticks(place)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas.print_figure(path, dpi=150)
