"""Colours and shapes that the pictures share."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, SOFT, LINE = "#1f2933", "#61707f", "#c3cad1"
RANKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito's colours, safe for the colour-blind; one for each rank."""


def box(axes: Axes, x: float, y: float, text: str, colour: str, size: tuple[float, float] = (0.8, 0.5)) -> None:
    """Draw a filled box around (x, y) with ``text`` in it; its colour says to which rank it belongs."""
    width, height = size
    style = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, style, facecolor=colour, edgecolor="none")
    axes.add_patch(patch)
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.2) -> None:
    """Draw an arrow from ``start`` to ``end``."""
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", color=colour, linewidth=width, mutation_scale=8, shrinkA=0, shrinkB=0
    )
    axes.add_patch(patch)


def note(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Write ``text`` beside the picture."""
    plain: dict[str, Any] = {"color": SOFT, "fontsize": 9, "va": "center"}
    axes.text(x, y, text, **(plain | options))


def canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches with one empty plane with these limits."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """Return ``colour`` at a strength of 0, which is white, to 1."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def heat(axes: Axes, value_RC: torch.Tensor, largest: float = 1.0, colours: tuple[str, str] = RANKS[:2]) -> None:
    """Draw a matrix as squares, its first row on top: white is exactly 0, and any other value is seen.

    ``largest``: the value of full strength, of the first colour; a negative one has the second colour.
    """
    rows, columns = value_RC.shape
    for row, values in enumerate(value_RC.tolist()):
        for column, value in enumerate(values):
            strength = 0.12 + 0.88 * min(abs(value) / largest, 1.0) if value else 0.0
            colour = tint(colours[value < 0], strength)
            place = column - 0.5, row - 0.5
            axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor=LINE, linewidth=0.4))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
