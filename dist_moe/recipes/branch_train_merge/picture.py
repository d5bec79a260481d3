"""A picture of which expert answers which text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

DOTS_PER_INCH = 120
MOST_NUMBERS = 16
"""Experts up to which the weights are written into the map."""


def draw_weights(path: Path, weights: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw the mean weight of each expert (columns) on the texts of each domain (rows). Raises OSError.

    ``weights``: by domain and expert; they sum to 1 for each domain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains, experts = list(weights), list(next(iter(weights.values())))
    weight_DJ = np.array([[weights[domain][expert] for expert in experts] for domain in domains])
    figure = Figure(figsize=(2.2 + 0.6 * len(experts), 1.6 + 0.36 * len(domains)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weight_DJ, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(experts)), experts, rotation=90, fontsize=8)
    axes.set_yticks(range(len(domains)), domains, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("domain of the text")
    axes.set_title(title, fontsize=10)
    for row, column in np.ndindex(*weight_DJ.shape) if len(experts) <= MOST_NUMBERS else ():
        value = weight_DJ[row, column]
        colour = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="mean weight")
    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_PER_INCH)
