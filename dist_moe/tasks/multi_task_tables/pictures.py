"""Pictures of a table's test: what each expert gives and who uses it, and whether probabilities are right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 120
BLUE, ORANGE = "#0072B2", "#D55E00"
MOST_LABELS, MOST_NUMBERS = 40, 16
"""Experts of a layer up to which each has its name below it; up to which its weights are written into the map."""


def draw_experts(path: Path, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw for each layer the gates' mean weights on its experts, and of their results the zeros, means and deviations.

    ``experts``: by layer, as :class:`TableWatch` gives them; without any, nothing is drawn. Raises OSError.
    """
    if not experts:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widest = max(len(of["mean"]) for of in experts.values())
    widths = min(max(0.45 * widest, 5.0), 14.0)
    heights = [max(2.8, 1.6 + 0.4 * len(of["gate_weight"])) for of in experts.values()]
    figure = Figure(figsize=(2 * widths + 1, sum(heights) + 0.6), layout="constrained")
    figure.suptitle("experts on the test rows")
    grid = figure.add_gridspec(len(experts), 3, width_ratios=(2, 1, 1), height_ratios=heights)
    for row, (layer, of) in enumerate(experts.items()):
        weights, zeros, spread = (figure.add_subplot(grid[row, column]) for column in range(3))
        _draw_weights(weights, of["gate_weight"])
        weights.set_title(f"{layer}: mean gate weight", fontsize=10)
        names, place_E = list(of["mean"]), np.arange(len(of["mean"]))
        zeros.bar(place_E, 100 * _row(of["zero_share"]), color=BLUE)
        zeros.set_ylim(0, 100)
        if not any(of["zero_share"].values()):
            zeros.text(0.5, 0.5, "none", transform=zeros.transAxes, ha="center", color="grey")
        zeros.set_title("zero activations (%)", fontsize=10)
        spread.errorbar(place_E, _row(of["mean"]), yerr=_row(of["std"]), fmt="o", color=ORANGE, capsize=3, markersize=4)
        spread.axhline(0, color="grey", linewidth=0.6)
        spread.set_title("results: mean ± std", fontsize=10)
        for axes in (weights, zeros, spread):
            shown = place_E[:: -(-len(names) // MOST_LABELS)]
            axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=8)
            axes.set_xlim(-0.6, len(names) - 0.4)
    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_PER_INCH)


def draw_calibration(path: Path, bins: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Draw for each binary target the observed share of positive rows over the predicted probability, bin by bin.

    ``bins``: by target, as :class:`TableWatch` gives them; without any, nothing is drawn. Raises OSError.
    """
    if not bins:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(bins), 3)
    rows = -(-len(bins) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.9 * rows + 0.6), layout="constrained")
    figure.suptitle("calibration on the test rows,\nbins of equal weight")
    for number, (target, of) in enumerate(bins.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        predicted_C, observed_C = (np.array(of[name], dtype=float) for name in ("predicted", "observed"))
        largest = 1.05 * max([*predicted_C, *observed_C, 1e-6])
        axes.plot([0, largest], [0, largest], color="grey", linewidth=0.8, linestyle="--", label="perfect")
        axes.plot(predicted_C, observed_C, marker="o", markersize=4, linewidth=1, color=BLUE, label="model")
        axes.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of positive rows")
        axes.set_title(target, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_PER_INCH)


def _draw_weights(axes: Axes, weights: Mapping[str, Mapping[str, float]]) -> None:
    weight_GE = np.stack([_row(of_gate) for of_gate in weights.values()])
    axes.imshow(weight_GE, aspect="auto", cmap="Blues", vmin=0)
    axes.set_yticks(range(len(weights)), list(weights), fontsize=8)
    if weight_GE.shape[1] <= MOST_NUMBERS:
        for (gate, expert), weight in np.ndenumerate(weight_GE):
            is_dark = weight > 0.6 * weight_GE.max()
            text = f"{weight:.2f}" if weight else "-"
            axes.text(expert, gate, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")


def _row(of_expert: Mapping[str, float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the numbers of experts in order, nan for those without one."""
    return np.array([np.nan if value is None else value for value in of_expert.values()], dtype=np.float64)
