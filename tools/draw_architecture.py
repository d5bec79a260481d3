"""Draw docs/architecture.svg: the floors of the package, the rooms on them, and what imports what.

    python tools/draw_architecture.py

Floors are those of the import contract in pyproject.toml, rooms are folders, an arrow bundles all imports from one
floor to another. The same source gives the same picture.
"""

from __future__ import annotations

import ast
import math
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PICTURE = REPOSITORY / "docs/architecture.svg"
PACKAGE = "dist_moe"

HOUSE, MARGIN, ARROWS = 790, 30, 290
GAP, PADDING, TITLE, CHIP = 12, 11, 40, 24
INK, SOFT, GROUND = "#1f2933", "#61707f", "#fbfaf7"


@dataclass(frozen=True)
class Room:
    """A folder or a module of the package. ``lines``: of all Python in it. ``about``: its docstring's first line."""

    name: str
    lines: int
    about: str
    rooms: tuple[Room, ...] = ()


@dataclass(frozen=True)
class House:
    """``floors``: from the top. ``imports``: how many from one floor to another, by their numbers from the top."""

    floors: list[list[Room]]
    imports: dict[tuple[int, int], int]


def survey(repository: Path = REPOSITORY) -> House:
    """Read floors, rooms and imports from the source."""
    contracts = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [[module.strip() for module in layer.split("|")] for layer in layers]
    floors = [[_room(repository / name.replace(".", "/")) for name in floor] for floor in names]
    floor_of = {name: number for number, floor in enumerate(names) for name in floor}
    imports: Counter[tuple[int, int]] = Counter()
    for name, number in floor_of.items():
        for path in _modules(repository / name.replace(".", "/")):
            targets = (floor_of.get(".".join(module.split(".")[:2])) for module in _imported(path))
            imports.update((number, target) for target in targets if target is not None and target != number)
    return House(floors, dict(sorted(imports.items())))


def _modules(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def _room(path: Path) -> Room:
    lines = sum(len(module.read_text(encoding="utf-8").splitlines()) for module in _modules(path))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    about = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]
    inside = [one for one in sorted(path.glob("*/")) if (one / "__init__.py").exists()] if path.is_dir() else []
    return Room(path.name, lines, about, tuple(_room(one) for one in inside))


def _imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, one for each import statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            one_up = node.module == PACKAGE  # from dist_moe import kernels
            yield from (f"{PACKAGE}.{alias.name}" for alias in node.names) if one_up else (node.module,)


def draw(house: House) -> str:
    """Return the picture as SVG text."""
    tops, y = [], 92
    widths = [_widths(floor) for floor in house.floors]
    heights = [max(map(_height, floor, of_rooms)) for floor, of_rooms in zip(house.floors, widths, strict=True)]
    for height in heights:
        tops.append(y)
        y += height + GAP
    total_width, bottom = MARGIN + HOUSE + ARROWS, y + 44
    right = MARGIN + HOUSE
    colours = [_colour(number, len(house.floors)) for number in range(len(house.floors))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {bottom}" '
        f'width="{total_width}" height="{bottom}" '
        f"font-family=\"'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
        f'<rect width="{total_width}" height="{bottom}" fill="{GROUND}"/>',
        f'<path d="M {MARGIN - 14} 80 L {MARGIN + HOUSE / 2} 16 L {right + 14} 80 Z" fill="#3b4a5a"/>',
        _text(MARGIN + HOUSE / 2, 64, PACKAGE, 22, "#ffffff", weight=700, anchor="middle"),
        _text(right + 34, 40, "imports go down only", 13, INK, weight=600),
        _text(right + 34, 58, "one arrow for all imports from a floor", 11.5, SOFT),
        _text(right + 34, 73, "to another, the thicker the more", 11.5, SOFT),
    ]
    for floor, of_rooms, top, height, colour in zip(house.floors, widths, tops, heights, colours, strict=True):
        names = " | ".join(room.name for room in floor)
        parts.append(f'<g class="floor" data-name="{names}">')
        left = float(MARGIN)
        for room, width in zip(floor, of_rooms, strict=True):
            parts += _draw_room(room, left, top, width, height, colour)
            left += width + GAP
        parts.append("</g>")
    parts += _draw_arrows(house, tops, heights, colours, right)
    total = sum(room.lines for floor in house.floors for room in floor)
    parts.append(f'<rect x="{MARGIN - 14}" y="{y}" width="{HOUSE + 28}" height="30" rx="3" fill="#d9d2c4"/>')
    ground = "torch · DeepSpeed · TorchX · TensorBoard · pydantic · safetensors · SciPy · Optuna"
    parts.append(_text(MARGIN + HOUSE / 2, y + 20, ground, 12.5, "#5b5344", anchor="middle"))
    parts.append(_text(right + 34, y + 20, f"{total:,} lines", 12.5, SOFT))
    return "\n".join([*parts, "</svg>", ""])


def _colour(number: int, count: int) -> str:
    """Return a hue between warm, at the top, and cool."""
    return f"hsl({round(18 + 222 * number / max(count - 1, 1))}, 48%, 46%)"


def _widths(floor: list[Room]) -> list[float]:
    """Return the widths of the rooms of a floor, by what their inner rooms need."""
    needs = [max(sum(map(_need, room.rooms)), 300.0) for room in floor]
    return [(HOUSE - GAP * (len(floor) - 1)) * need / sum(needs) for need in needs]


def _need(room: Room) -> float:
    return 62 + 6.8 * len(room.name)


def _shelves(room: Room, width: float) -> list[list[Room]]:
    """Return the inner rooms in rows that fit, as even as the order allows."""
    rows = max(1, math.ceil(sum(map(_need, room.rooms)) / (width - 2 * PADDING)))
    size = math.ceil(len(room.rooms) / rows)
    return [list(room.rooms[start : start + size]) for start in range(0, len(room.rooms), size)] if size else []


def _height(room: Room, width: float) -> float:
    shelves = _shelves(room, width)
    return TITLE + (len(shelves) * (CHIP + 5) + 5 if shelves else 4)


def _draw_room(room: Room, x: float, y: float, width: float, height: float, colour: str) -> Iterator[str]:
    yield f'<g class="room" data-name="{room.name}">'
    yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="6" fill="#ffffff" stroke="#d8d4ca"/>'
    yield f'<path d="M {x + 6:.1f} {y} h -1 a 5 5 0 0 0 -5 5 v {height - 10} a 5 5 0 0 0 5 5 h 1 Z" fill="{colour}"/>'
    yield _text(x + PADDING + 6, y + 18, room.name, 14.5, INK, weight=700)
    yield _text(x + width - PADDING, y + 18, f"{room.lines:,} lines", 11, SOFT, anchor="end")
    about = room.about.removeprefix(f"{room.name.capitalize()}: ").replace("`", "").replace("->", "→").rstrip(".:")
    yield _text(x + PADDING + 6, y + 34, _shortened(about[:1].upper() + about[1:], width - 30, 11.5), 11.5, SOFT)
    top = y + TITLE + 1
    for shelf in _shelves(room, width):
        spare = (width - 2 * PADDING - 6 + 7 - sum(map(_need, shelf))) / len(shelf)
        left = x + PADDING + 6
        for inner in shelf:
            share = _need(inner) + spare
            yield f'<g class="room" data-name="{room.name}/{inner.name}"><title>{escape(inner.about)}</title>'
            box = f'x="{left:.1f}" y="{top}" width="{share - 7:.1f}" height="{CHIP}" rx="4"'
            yield f'<rect {box} fill="{colour}" fill-opacity="0.13"/>'
            yield _text(left + 8, top + 16, inner.name, 11.5, INK)
            yield _text(left + share - 14, top + 16, f"{inner.lines:,}", 10.5, SOFT, anchor="end")
            yield "</g>"
            left += share
        top += CHIP + 5
    yield "</g>"


def _draw_arrows(
    house: House, tops: list[float], heights: list[float], colours: list[str], right: float
) -> Iterator[str]:
    """Yield arcs at the right of the house, nested: what comes in ends above what goes out, the farthest outermost."""
    count = len(tops)
    ends: dict[tuple[int, int, str], float] = {}
    for floor in range(count):
        into = [(start, floor, "in") for start in range(floor - 1, -1, -1) if (start, floor) in house.imports]
        out = [(floor, stop, "out") for stop in range(count - 1, floor, -1) if (floor, stop) in house.imports]
        for place, end in enumerate(into + out):
            ends[end] = tops[floor] + heights[floor] * (place + 1) / (len(into) + len(out) + 1)
    for (start, stop), imports in sorted(house.imports.items(), key=lambda item: item[0][0] - item[0][1]):
        above, below = ends[start, stop, "out"], ends[start, stop, "in"]
        reach = right + 8 + (ARROWS - 30) * 4 / 3 * ((stop - start) / (count - 1)) ** 0.8
        stroke = min(0.7 + 0.42 * imports**0.5, 6)
        arc = f"M {right + 1} {above:.1f} C {reach:.0f} {above:.1f}, {reach:.0f} {below:.1f}, {right + 8} {below:.1f}"
        names = [" | ".join(room.name for room in house.floors[number]) for number in (start, stop)]
        yield (
            f'<g class="arrow" data-from="{names[0]}" data-to="{names[1]}"><title>{names[0]} imports {names[1]}: '
            f'{imports}</title><path d="{arc}" fill="none" stroke="{colours[start]}" stroke-width="{stroke:.2f}" '
            f'stroke-opacity="0.6"/><path d="M {right + 1} {below:.1f} l 8 -3.4 v 6.8 Z" fill="{colours[start]}"/></g>'
        )


def _text(x: float, y: float, words: str, size: float, fill: str, *, weight: int = 400, anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _shortened(words: str, width: float, size: float) -> str:
    """Return the part of a sentence that fits, by a generous estimate of its width: up to a comma, if possible."""
    limit = int(width / (0.52 * size))
    if len(words) <= limit:
        return words
    whole = max(words.rfind(mark, 0, limit) for mark in (". ", ", ", "; ", ": "))
    return words[:whole] if whole > 0 else words[:limit].rsplit(" ", 1)[0] + " …"


if __name__ == "__main__":
    PICTURE.write_text(draw(survey()), encoding="utf-8")
