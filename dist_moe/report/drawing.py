"""Line charts and heat maps as SVG, to stand in a page: they scale to its width, and cost milliseconds.

Lines are told apart by Okabe and Ito's colours and by dashes, fields by viridis: all kinds of colour vision see them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_moe.engine.monitor.pictures import VIRIDIS

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_MOST_NAMED = 16
"""Lines that the legend names; the others are drawn."""
_HALF = 28
"""Letters of a label that stands in half of the width."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 210, 58, 12, 24, 34


@dataclass(frozen=True)
class Line:
    """Points (N,) of a line chart. ``marked``: a mark at each, for values that are few.

    ``colour``, ``dash``: numbers of its looks; lines of several charts that belong together have the same.
    """

    label: str
    x_N: NDArray[np.float64]
    y_N: NDArray[np.float64]
    marked: bool = False
    colour: int = 0
    dash: int = 0

    @property
    def style(self) -> str:
        """Attributes of a drawn line: its colour, and its dashes, which also tell lines of one colour apart."""
        dashes = _DASHES[(self.dash + self.colour // len(_COLOURS)) % len(_DASHES)]
        return f'stroke="{self.fill}" stroke-dasharray="{dashes}"'

    @property
    def fill(self) -> str:
        """Return its colour."""
        return _COLOURS[self.colour % len(_COLOURS)]


def line_chart(title: str, unit: str, lines: Sequence[Line], x_label: str = "step", *, named: bool = False) -> str:
    """Return a chart of ``lines``, whose values that are not finite are left out; "" if nothing is left.

    ``named``: with a legend even of one line.
    """
    seen = [np.isfinite(line.y_N) for line in lines]
    lines = [
        replace(line, x_N=line.x_N[ok], y_N=line.y_N[ok]) for line, ok in zip(lines, seen, strict=True) if ok.any()
    ]
    if not lines:
        return ""
    xs, ys = (np.concatenate(values) for values in ([line.x_N for line in lines], [line.y_N for line in lines]))
    x_ticks, y_ticks = _ticks(xs.min(), xs.max(), 6), _ticks(ys.min(), ys.max(), 5)
    (x0, x1), (y0, y1) = (_limits(values, ticks) for values, ticks in ((xs, x_ticks), (ys, y_ticks)))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    shown = lines[:_MOST_NAMED] if named or len(lines) > 1 else []
    columns = 2 if all(len(line.label) <= _HALF for line in shown) else 1
    legend_rows = math.ceil(len(shown) / columns)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * (x - x0) / (x1 - x0), _TOP + height * (1 - (y - y0) / (y1 - y0))

    parts = [_text(_LEFT, 14, f"{title} ({unit})" if unit else title, "start", "head")]
    for y in y_ticks:
        _, at = place(x0, y)
        parts += [f'<path class="grid" d="M{_LEFT} {at:.1f}h{width}"/>', _text(_LEFT - 5, at + 4, _number(y), "end")]
    for x in x_ticks:
        at, _ = place(x, y0)
        parts += [f'<path class="axis" d="M{at:.1f} {_TOP + height}v4"/>']
        parts += [_text(at, _TOP + height + 16, _number(x), "middle")]
    parts += [f'<path class="axis" d="M{_LEFT} {_TOP}v{height}h{width}"/>']
    parts += [_text(_LEFT + width / 2, _HEIGHT - 4, x_label, "middle")]
    for line in lines:
        points = [place(x, y) for x, y in zip(line.x_N, line.y_N, strict=True)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line" {line.style} points="{drawn}"/>')
        if line.marked or len(points) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.fill}"/>' for x, y in points]
    for i, line in enumerate(shown):
        x, y = _LEFT + (i % columns) * width / columns, _HEIGHT + 12 + 15 * (i // columns)
        label = line.label[: _HALF if columns == 2 else 2 * _HALF]
        parts += [f'<path class="line" {line.style} d="M{x} {y - 4}h18"/>', _text(x + 23, y, label, "start")]
    return _svg(_WIDTH, _HEIGHT + 16 * legend_rows + (4 if legend_rows else 0), parts, title)


def heat_map(
    title: str,
    values_HW: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    axes: tuple[str, str],
    unit: str,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return a matrix as colours, NaN white. ``axes``: what rows and columns are. ``limits``: values of the darkest and
    the lightest colour; None: 0 and the largest."""
    height, width = values_HW.shape
    low, high = limits or (0.0, float(np.nanmax(values_HW, initial=0.0)) or 1.0)
    place_HW = np.clip((values_HW - low) / (high - low), 0, 1)
    left = 14 + 6.2 * min(18, max(len(name) for name in rows))
    w, h = _WIDTH - left - 70, float(np.clip(18 * height, 36, 360))
    parts = [_text(left, 14, title, "start", "head"), _image(place_HW, left, _TOP, w, h)]
    parts.append(f'<rect class="axis" x="{left}" y="{_TOP}" width="{w}" height="{h}"/>')
    some_rows = range(0, height, max(1, math.ceil(height * 13 / h)))
    parts += [_text(left - 4, _TOP + (i + 0.5) * h / height + 4, rows[i][:18], "end") for i in some_rows]
    longest = max(len(name) for name in columns)
    some_columns = range(0, width, max(1, math.ceil(width * (6.5 * longest + 6) / w)))
    parts += [_text(left + (i + 0.5) * w / width, _TOP + h + 14, columns[i], "middle") for i in some_columns]
    parts.append(_text(left + w / 2, _TOP + h + 29, f"{axes[1]} (down: {axes[0]})", "middle"))
    scale = np.linspace(1, 0, 64)[:, None]
    parts += [_image(scale, left + w + 8, _TOP, 10, h), _text(left + w + 22, _TOP + 9, _number(high), "start")]
    parts.append(_text(left + w + 22, _TOP + h, _number(low), "start"))
    parts.append(_text(_WIDTH - 2, 14, unit, "end"))
    return _svg(_WIDTH, _TOP + h + 34, parts, title)


def _image(place_HW: NDArray[np.float64], x: float, y: float, width: float, height: float) -> str:
    """Return numbers in 0..1 as colours, NaN as white: a picture with a palette, a byte for each."""
    index_HW = np.where(np.isnan(place_HW), 255, np.nan_to_num(place_HW) * 254 + 0.5).astype(np.uint8)
    anchors = np.linspace(0, 254, len(VIRIDIS))
    colours = np.stack([np.interp(np.arange(255), anchors, channel) for channel in VIRIDIS.T], axis=1)
    image = Image.fromarray(index_HW)
    image.putpalette([*colours.astype(np.uint8).flatten().tolist(), 255, 255, 255])
    file = BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<image {place} preserveAspectRatio="none" class="cells" href="data:image/png;base64,{data}"/>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{inner}</svg>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "note") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers within [low, high], at most about as many as asked for."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _limits(values: NDArray[np.float64], ticks: Sequence[float]) -> tuple[float, float]:
    low, high = min(float(values.min()), *ticks), max(float(values.max()), *ticks)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
