"""Pictures with axes, ids and a scale, drawn in milliseconds: training draws them while it waits for nobody.

Matplotlib takes a third of a second for each and a second to load, which is more than the small runs that people try
first may spend. Colours are viridis, which all kinds of colour vision tell apart, as its lightness rises throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_WIDTHS, _WIDEST, _HEIGHTS, _CELL = (224, 360), 640, (40, 300), 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 84, 28, 46
_MOST_TICKS, _FONT_SIZE = 16, 13
VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ]
)  # fmt: skip
_NOTHING, _INK, _FAINT, _BAR = (255, 255, 255), (40, 40, 40), (170, 170, 170), (49, 104, 142)


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
    def size(self) -> tuple[int, int]:
        """Width and height of the field in pixels."""
        height, width = self.values.shape
        return _field_width(width), _within(height * 18, _HEIGHTS)

    def draw(self, canvas: ImageDraw.ImageDraw, image: Image.Image, left: int, top: int) -> None:
        """Draw into ``image``, the field's corner at (left, top)."""
        (height, width), (w, h) = self.values.shape, self.size
        low, high = self._limits()
        place = np.clip(np.nan_to_num((self.values - low) / ((high - low) or 1.0)), 0.0, 1.0)
        pixels = _coloured(place)
        pixels[np.isnan(self.values)] = _NOTHING
        image.paste(Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST), (left, top))
        canvas.rectangle((left - 1, top - 1, left + w, top + h), outline=_FAINT)
        for i in _ticks(height, min(_MOST_TICKS, h // 14)):
            y = top + (i + 0.5) * h / height
            _write(canvas, (left - 5, y), _name(self.row_names, i)[:10], "rm")
        _column_ticks(canvas, left, top + h, w, width, self.column_names)
        bar = Image.fromarray(_coloured(np.linspace(1, 0, h)[:, None])).resize((12, h))
        image.paste(bar, (left + w + 10, top))
        for value, y in ((high, top + 5), (low, top + h - 5)):
            _write(canvas, (left + w + 27, y), f"{value:.3g}", "lm")
        _write(canvas, (left, top - 12), f"{self.title} (colour: {self.unit})", "lm")
        white = f"; white: {self.nothing}" if self.nothing else ""
        _write(canvas, (left, top + h + 28), f"{self.columns} (down: {self.rows}{white})", "lm")

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

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the field in pixels."""
        return _field_width(len(self.values)), 120

    def draw(self, canvas: ImageDraw.ImageDraw, image: Image.Image, left: int, top: int) -> None:
        """Draw into ``image``, the field's corner at (left, top)."""
        (w, h), count = self.size, len(self.values)
        highest = max(float(self.values.max(initial=0.0)), self.line or 0.0) or 1.0
        for i, value in enumerate(self.values):
            x, gap = left + i * w / count, 0.1 * w / count
            canvas.rectangle((x + gap, top + h * (1 - value / highest), x + w / count - gap, top + h), fill=_BAR)
        if self.line is not None:
            y = top + h * (1 - self.line / highest)
            for dash in range(left, left + w, 10):
                canvas.line((dash, y, dash + 5, y), fill=_INK)
            _write(canvas, (left + w + 5, y), f"{self.line:.3g}", "lm")
        canvas.line((left, top, left, top + h, left + w, top + h), fill=_INK)
        for value, y in ((highest, top), (0.0, top + h)):
            _write(canvas, (left - 5, y), f"{value:.3g}", "rm")
        _column_ticks(canvas, left, top + h, w, count, None)
        _write(canvas, (left, top - 12), f"{self.title} ({self.unit})", "lm")
        _write(canvas, (left + w / 2, top + h + 28), self.columns, "mm")


@dataclass(frozen=True)
class NamedBars:
    """Numbers by name as bars that lie, one below the other, each with its number; one below 0 has no bar."""

    values: Mapping[str, float]
    title: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the field in pixels."""
        return _WIDTHS[1], 18 * len(self.values)

    def draw(self, canvas: ImageDraw.ImageDraw, image: Image.Image, left: int, top: int) -> None:
        """Draw into ``image``, the field's corner at (left, top)."""
        highest = max(*self.values.values(), 0.0) or 1.0
        for i, (name, value) in enumerate(self.values.items()):
            y = top + 18 * i
            canvas.rectangle((left, y + 2, left + self.size[0] * max(value, 0.0) / highest, y + 15), fill=_BAR)
            _write(canvas, (left - 5, y + 9), name[:10], "rm")
            _write(canvas, (left + self.size[0] + 8, y + 9), f"{value:.4g}", "lm")
        _write(canvas, (left, top - 12), self.title, "lm")


Panel = HeatMap | Bars | NamedBars


def draw(panels: Sequence[Panel]) -> Image.Image:
    """Return the picture of ``panels``, one below the other. Raises ValueError if there is none."""
    if not panels:
        raise ValueError("panels: a picture needs at least one")
    width = _LEFT + max(panel.size[0] for panel in panels) + _RIGHT
    heights = [_TOP + panel.size[1] + _BOTTOM for panel in panels]
    image = Image.new("RGB", (width, sum(heights)), _NOTHING)
    canvas, top = ImageDraw.Draw(image), 0
    for panel, height in zip(panels, heights, strict=True):
        panel.draw(canvas, image, _LEFT, top + _TOP)
        top += height
    return image


def has_grown(step: int, drawn_at: int) -> bool:
    """Return whether a run of ``step`` steps is to be drawn again: it is half as long again, and 100 steps longer."""
    return step >= max(drawn_at + drawn_at // 2, drawn_at + 100)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file of up to 256 colours."""
    file = BytesIO()
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _write(canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str) -> None:
    canvas.text(place, text, fill=_INK, font=_font(), anchor=anchor)


def _coloured(place: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (..., 3) colours of numbers in 0..1."""
    anchors = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(place, anchors, channel) for channel in VIRIDIS.T], axis=-1).astype(np.uint8)


def _field_width(columns: int) -> int:
    """Return the pixels of so many columns: TensorBoard shows a picture as large as a card, of about 350."""
    return max(_within(columns * _CELL, _WIDTHS), min(2 * columns, _WIDEST))


def _within(size: int, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], size))


def _ticks(count: int, most: int) -> range:
    """Return at most about ``most`` of the numbers below ``count``, in round steps."""
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= step * most))


def _name(names: Sequence[str] | None, i: int) -> str:
    return str(i) if names is None else names[i]


def _column_ticks(
    canvas: ImageDraw.ImageDraw, left: int, y: int, w: int, count: int, names: Sequence[str] | None
) -> None:
    longest = max(len(_name(names, i)) for i in range(count))
    for i in _ticks(count, max(2, w // (8 * min(longest, 10) + 8))):
        x = left + (i + 0.5) * w / count
        canvas.line((x, y, x, y + 3), fill=_INK)
        _write(canvas, (x, y + 11), _name(names, i)[:10], "mm")
