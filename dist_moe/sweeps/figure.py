"""The pictures of a sweep: budget curves, and differences between rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from dist_moe.sweeps.paired import Differences
from dist_moe.sweeps.statistics import LEVEL, BudgetCurve
from dist_moe.sweeps.summary import RowSummary

# Okabe and Ito's colours, which people tell apart whatever their colour vision; without the faint yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
FEW = 12  # points of a line, which are marked one by one
MARK_EVERY = 0.12  # else: of the picture's diagonal
INCHES = (8.0, 4.8)
DOTS_PER_INCH = 150


def draw_budget_curves(path: Path, title: str, unit: str, rows: Sequence[RowSummary]) -> None:
    """Draw one line per row against its compute, or, where that of a row is not known, the number of ``unit``.

    With its 5-95 % band. Rows with a plus, as "COMET+ (swap)", are broken, in the colour of the row without it.
    """
    known = all(math.isfinite(row.cost) for row in rows if row.curve is not None)
    curves = {row.name: (row.curve, row.cost if known else 1.0) for row in rows if row.curve is not None}
    figure = Figure(figsize=INCHES, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(group_of(name) for name in curves))
    for number, group in enumerate(groups):
        of_group = sorted((name for name in curves if group_of(name) == group), key=lambda name: "+" in name)
        for name, style in zip(of_group, itertools.cycle(LINES if "+" not in of_group[0] else LINES[1:])):
            _draw(axes, name, *curves[name], number, style)
    axes.set_title(title)
    axes.set_xlabel("compute of the search (processor seconds; seconds with a GPU)" if known else f"{unit}s")
    axes.set_ylabel(f"expected test loss of the {unit}\nbest by validation (band: 5-95 %)")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.grid(alpha=0.3)
    if curves:
        figure.legend(loc="outside right upper", frameon=False)
    canvas.print_figure(path, dpi=DOTS_PER_INCH)


def draw_differences(path: Path, title: str, differences: Differences) -> None:
    """Draw the interval of each row's difference to the first row, a panel for each metric; none without rows.

    Intervals that hold 0 are grey.
    """
    if not differences:
        return
    names, metrics = list(differences), list(next(iter(differences.values())))
    beside = 0.5 + 0.085 * max(map(len, names))  # inches that names take, left of the panels
    width = max(beside + 2.6 * len(metrics), 6.0)  # six for the title
    figure = Figure(figsize=(width, 1.6 + 0.35 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, name in enumerate(names):
            one = differences[name][metric]
            colour = "#888888" if one.verdict == "within" else COLOURS[0]
            reach = one.high - one.mean
            axes.errorbar(one.mean, place, xerr=reach, fmt="o", color=colour, capsize=3, markersize=5)
        axes.set_title(metric, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(f"{title}\ntest, paired by seed, {100 * LEVEL:g} % intervals; grey: 0 is within", fontsize=10)
    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_PER_INCH)


def group_of(name: str) -> str:
    """Return the name without its plus and what follows: 'COMET' of 'COMET+' and of 'COMET+ (swap)'."""
    return name.partition("+")[0].rstrip()


def _draw(axes: Axes, name: str, curve: BudgetCurve, cost: float, group: int, style: str) -> None:
    colour, spent_B = COLOURS[group % len(COLOURS)], curve.budgets * cost
    axes.fill_between(spent_B, curve.low, curve.high, alpha=0.05, linewidth=0, color=colour)
    axes.plot(
        spent_B,
        curve.expected,
        label=name,
        linewidth=1.8,
        linestyle=style,
        marker=MARKERS[(group + group // len(COLOURS)) % len(MARKERS)],
        markersize=5,
        markevery=1 if len(spent_B) <= FEW else MARK_EVERY,
        color=colour,
    )
