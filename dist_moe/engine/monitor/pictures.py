"""Pictures with axes, ids and a scale, drawn in milliseconds: training draws them while it waits for nobody.

Matplotlib takes a third of a second for each and a second to load, which is more than the small runs that people try
first may spend. Colours are viridis, which all kinds of colour vision tell apart, as its lightness rises throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CARD = 350
"""Units of every picture's width. TensorBoard's cards have as many pixels, and drop some of what is wider: strokes of
letters and thin lines with them. So what needs more pixels has two or three for each unit, and for each stroke."""
_SCALES, _HEIGHTS, _CELL = 3, (40, 300), 18
_LEFT, _RIGHT, _TOP, _BOTTOM = (24, 130), 72, 46, 46
_MOST_TICKS, _FONT_SIZE = 16, 13
VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ]
)  # fmt: skip
_NOTHING, _INK, _FAINT, _BAR = (255, 255, 255), (40, 40, 40), (170, 170, 170), (49, 104, 142)


class Pen:
    """Draws into an image of the width of a card and ``height`` units, with ``scale`` pixels for each unit."""

    def __init__(self, height: int, scale: int) -> None:
        self.image = Image.new("RGB", (_CARD * scale, height * scale), _NOTHING)
        self._canvas, self._scale = ImageDraw.Draw(self.image), scale

    def text(self, x: float, y: float, text: str, anchor: str, room: float = _CARD) -> None:
        """Write ``text``, its middle left out where it is wider than ``room``."""
        place = (x * self._scale, y * self._scale)
        self._canvas.text(place, fitted(text, room), fill=_INK, font=_font(_FONT_SIZE * self._scale), anchor=anchor)

    def line(self, *places: float) -> None:
        """Draw a line through (x, y, x, y, ...)."""
        self._canvas.line([place * self._scale for place in places], fill=_INK, width=self._scale)

    def box(self, *corners: float) -> None:
        """Draw a bar from (x, y) to (x, y)."""
        self._canvas.rectangle([place * self._scale for place in corners], fill=_BAR)

    def cells(self, colour_HW3: NDArray[np.uint8], left: int, top: int, w: int, h: int) -> None:
        """Draw a matrix of colours in a frame."""
        s = self._scale
        self.image.paste(
            Image.fromarray(colour_HW3).resize((w * s, h * s), Image.Resampling.NEAREST), (left * s, top * s)
        )
        frame = (left * s - 1, top * s - 1, (left + w) * s, (top + h) * s)
        self._canvas.rectangle(frame, outline=_FAINT)

    def header(self, top: int, title: str, note: str = "") -> None:
        """Write above a panel what it is, and in a second line what its colours or heights are."""
        for y, line in ((top - 32, title if note else ""), (top - 15, note or title)):
            self.text(4, y, line, "lm", _CARD - 8)


@dataclass(frozen=True)
class HeatMap:
    """A matrix (H, W) as colours; NaN is white, and ``nothing`` says what that means.

    ``rows``, ``columns``: what the axes count. ``unit``: what a colour stands for. ``row_names``, ``column_names``: ids
    at the axes; None: numbers from 0. ``limits``: values of the darkest and of the lightest colour; None: 0, or the
    least value if that is below, to the largest.
    """

    values: NDArray[np.float64]
    title: str
    rows: str
    columns: str
    unit: str
    row_names: Sequence[str] | None = None
    column_names: Sequence[str] | None = None
    limits: tuple[float, float] | None = None
    nothing: str = ""

    @property
    def height(self) -> int:
        """Units of the field."""
        return _within(len(self.values) * _CELL, _HEIGHTS)

    @property
    def width(self) -> int:
        """Places that the field's width must tell apart."""
        return self.values.shape[1]

    @property
    def labels(self) -> Sequence[str]:
        """Words to the left of the field."""
        return [str(len(self.values) - 1)] if self.row_names is None else short_names(self.row_names)

    def draw(self, pen: Pen, left: int, top: int, w: int) -> None:
        """Draw the field, ``w`` units wide, its corner at (left, top)."""
        (height, width), h = self.values.shape, self.height
        low, high = self._limits()
        place = np.clip(np.nan_to_num((self.values - low) / ((high - low) or 1.0)), 0.0, 1.0)
        pixels = _coloured(place)
        pixels[np.isnan(self.values)] = _NOTHING
        pen.cells(pixels, left, top, w, h)
        for i in _ticks(height, min(_MOST_TICKS, h // 14)):
            label = str(i) if self.row_names is None else self.labels[i]
            pen.text(left - 5, top + (i + 0.5) * h / height, label, "rm", left - 6)
        _column_ticks(pen, left, top + h, w, width, self.column_names)
        pen.cells(_coloured(np.linspace(1, 0, h)[:, None]), left + w + 10, top, 12, h)
        for value, y in ((high, top + 5), (low, top + h - 5)):
            pen.text(left + w + 27, y, f"{value:.3g}", "lm")
        white = f"; white: {self.nothing}" if self.nothing else ""
        pen.header(top, self.title, f"colour: {self.unit}{white}")
        pen.text(left, top + h + 28, f"{self.columns} (down: {self.rows})" if self.columns else "", "lm")

    def _limits(self) -> tuple[float, float]:
        known = self.values[~np.isnan(self.values)]
        if self.limits is not None or not len(known):
            return self.limits or (0.0, 1.0)
        return min(0.0, float(known.min())), float(known.max())


@dataclass(frozen=True)
class Bars:
    """Numbers (W,) >= 0 as bars, one for each id. ``line``: a value to compare with, dashed."""

    values: NDArray[np.float64]
    title: str
    columns: str
    unit: str
    line: float | None = None
    height: ClassVar[int] = 120
    """Units of the field."""

    @property
    def width(self) -> int:
        """Places that the field's width must tell apart."""
        return len(self.values)

    @property
    def labels(self) -> Sequence[str]:
        """Words to the left of the field."""
        return [f"{self._highest:.3g}"]

    @property
    def _highest(self) -> float:
        return max(float(self.values.max(initial=0.0)), self.line or 0.0) or 1.0

    def draw(self, pen: Pen, left: int, top: int, w: int) -> None:
        """Draw the field, ``w`` units wide, its corner at (left, top)."""
        h, count, highest = self.height, len(self.values), self._highest
        for i, value in enumerate(self.values):
            x, gap = left + i * w / count, 0.1 * w / count
            pen.box(x + gap, top + h * (1 - value / highest), x + w / count - gap, top + h)
        if self.line is not None:
            y = top + h * (1 - self.line / highest)
            for dash in range(left, left + w, 10):
                pen.line(dash, y, dash + 5, y)
            pen.text(left + w + 5, y, f"{self.line:.3g}", "lm")
        pen.line(left, top, left, top + h, left + w, top + h)
        for value, y in ((highest, top), (0.0, top + h)):
            pen.text(left - 5, y, f"{value:.3g}", "rm")
        _column_ticks(pen, left, top + h, w, count, None)
        pen.header(top, self.title, f"height: {self.unit}")
        pen.text(left + w / 2, top + h + 28, self.columns, "mm")


@dataclass(frozen=True)
class NamedBars:
    """Numbers by name as bars that lie, one below the other, each with its number; one below 0 has no bar."""

    values: Mapping[str, float]
    title: str
    width: ClassVar[int] = 1
    """Places that the field's width must tell apart."""

    @property
    def height(self) -> int:
        """Units of the field."""
        return _CELL * len(self.values)

    @property
    def labels(self) -> Sequence[str]:
        """Words to the left of the field."""
        return short_names(list(self.values))

    def draw(self, pen: Pen, left: int, top: int, w: int) -> None:
        """Draw the field, ``w`` units wide, its corner at (left, top)."""
        highest = max(*self.values.values(), 0.0) or 1.0
        for i, (label, value) in enumerate(zip(self.labels, self.values.values(), strict=True)):
            y = top + _CELL * i
            pen.box(left, y + 2, left + w * max(value, 0.0) / highest, y + 15)
            pen.text(left - 5, y + 9, label, "rm", left - 6)
            pen.text(left + w + 8, y + 9, f"{value:.4g}", "lm")
        pen.header(top, self.title)


Panel = HeatMap | Bars | NamedBars


def layout(panels: Sequence[Panel]) -> tuple[int, int, int]:
    """Return where the fields of ``panels`` begin and how wide they are, in units, and the pixels of a unit."""
    longest = max(_font(_FONT_SIZE).getlength(label) for panel in panels for label in panel.labels)
    left = _within(math.ceil(longest) + 7, _LEFT)
    w = _CARD - left - _RIGHT
    return left, w, min(_SCALES, max(math.ceil(panel.width / w) for panel in panels))


def draw(panels: Sequence[Panel]) -> Image.Image:
    """Return the picture of ``panels``, one below the other. Raises ValueError if there is none."""
    if not panels:
        raise ValueError("panels: a picture needs at least one")
    left, w, scale = layout(panels)
    heights = [_TOP + panel.height + _BOTTOM for panel in panels]
    pen, top = Pen(sum(heights), scale), 0
    for panel, height in zip(panels, heights, strict=True):
        panel.draw(pen, left, top + _TOP, w)
        top += height
    return pen.image


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without what all have in common: ``layers.5`` of ``encoder.layers.5.feed_forward.moe``.

    They are cut at their dots; of what is in common in front the last piece stays.
    """
    pieces = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names)
    room = min(map(len, pieces)) - 1
    front = next((i for i in range(room) if len({piece[i] for piece in pieces}) > 1), room)
    behind = next((i for i in range(room - front) if len({piece[-1 - i] for piece in pieces}) > 1), room - front)
    return [".".join(piece[max(0, front - 1) : len(piece) - behind]) for piece in pieces]


def fitted(text: str, room: float) -> str:
    """Return ``text``, or as much of its beginning and end as ``room`` units have place for."""
    font, keep = _font(_FONT_SIZE), len(text)
    short = text
    while font.getlength(short) > room and keep > 2:
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return short


def has_grown(step: int, drawn_at: int) -> bool:
    """Return whether a run of ``step`` steps is to be drawn again: it is half as long again, and 100 steps longer."""
    return step >= max(drawn_at + drawn_at // 2, drawn_at + 100)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file of up to 256 colours."""
    file = BytesIO()
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


@lru_cache(maxsize=_SCALES)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _coloured(place: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (..., 3) colours of numbers in 0..1."""
    anchors = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(place, anchors, channel) for channel in VIRIDIS.T], axis=-1).astype(np.uint8)


def _within(size: int, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], size))


def _ticks(count: int, most: int) -> range:
    """Return at most about ``most`` of the numbers below ``count``, in round steps."""
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= step * most))


def _column_ticks(pen: Pen, left: int, y: int, w: int, count: int, names: Sequence[str] | None) -> None:
    labels = [str(i) for i in range(count)] if names is None else short_names(names)
    room = min(max(map(_font(_FONT_SIZE).getlength, labels)), 80)
    for i in _ticks(count, max(2, int(w // (room + 8)))):
        x = left + (i + 0.5) * w / count
        pen.line(x, y, x, y + 3)
        pen.text(x, y + 11, labels[i], "mm", room)
