"""Picture of which experts were merged: a row for each layer, a cell for each expert, groups side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_moe.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "merged_experts.png"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Those of Okabe and Ito which people tell apart whatever their colour vision; neighbours differ in lightness."""

_REMOVED = "#FFFFFF"
_GAP, _HEIGHT = 0.3, 0.72
_FAINTEST = 0.15
"""How strong the colour of an expert is that no token uses; 1 for the most used one of its layer."""


def write_picture(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a compression's report as PNG. Raises UserError if that cannot be done."""
    try:
        draw(report).savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def draw(report: Mapping[str, Any]) -> Figure:
    """Return the picture: colours tell neighbouring groups apart, strong ones are of experts that are used much.

    Leaders, whose place the new expert takes, have bold numbers and a triangle. Experts that were removed are hatched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers = report["layers"]
    widest = max(len(layer["usage"]) + _GAP * (len(layer["groups"]) + 1) for layer in layers)
    figure = Figure(figsize=(max(5.0, 0.36 * widest + 1.6), 0.5 * len(layers) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, layer in enumerate(layers):
        usage_E, left = layer["usage"], 0.0
        removed = sorted(set(range(len(usage_E))) - {expert for group in layer["groups"] for expert in group})
        groups = [*layer["groups"], *([removed] if removed else [])]
        for number, group in enumerate(groups):
            is_removed = group is removed
            for expert in group:
                strength = _FAINTEST + (1 - _FAINTEST) * usage_E[expert] / (max(usage_E) or 1.0)
                colour = _REMOVED if is_removed else _mixed(COLOURS[number % len(COLOURS)], strength)
                cell = Rectangle((left, row - _HEIGHT / 2), 1, _HEIGHT, facecolor=colour, edgecolor="white")
                cell.set(**{"hatch": "////", "edgecolor": "#BBBBBB"} if is_removed else {})
                axes.add_patch(cell)
                leads = not is_removed and expert == layer["leaders"][number]
                ink = "white" if _is_dark(colour) else "black"
                style: dict[str, Any] = {"color": ink, "ha": "center", "va": "center"}
                axes.text(left + 0.5, row, str(expert), fontsize=8, weight="bold" if leads else "normal", **style)
                if leads:
                    axes.plot(left + 0.5, row - 0.27, marker="v", markersize=3.5, color=ink)
                left += 1
            edge = "#BBBBBB" if is_removed else "black"
            frame = (left - len(group), row - _HEIGHT / 2), len(group), _HEIGHT
            axes.add_patch(Rectangle(*frame, fill=False, edgecolor=edge, linewidth=1.0))
            left += _GAP
    names = [f"{layer['layer']}\n{len(layer['usage'])} to {len(layer['groups'])}" for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    axes.set(xlim=(-_GAP, widest), ylim=(len(layers) - 0.5, -0.5), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Experts by layer, method={report['compress']['method']}", fontsize=9)
    words = "framed: one expert now; bold, triangle: leads\nstronger: used more; hatched: removed"
    axes.set_xlabel(words, fontsize=7.5)
    return figure


def _mixed(colour: str, strength: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _is_dark(colour: str | tuple[float, float, float]) -> bool:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
