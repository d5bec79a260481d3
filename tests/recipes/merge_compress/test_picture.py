"""The picture of merged experts: each is there once, with its group, its leader and its use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dist_moe.errors import UserError
from dist_moe.recipes.merge_compress.picture import COLOURS, draw, write_picture

MERGED = {"layer": "layers.1.moe", "leaders": [1, 2], "groups": [[1, 3], [0, 2]], "usage": [0.1, 0.5, 0.4, 0.0]}
PRUNED = {"layer": "layers.3.moe", "leaders": [1, 2], "groups": [[1], [2]], "usage": [0.1, 0.5, 0.4, 0.0]}


def cells_of(layer: dict[str, Any]) -> list[tuple[str, bool, tuple[float, ...], str | None]]:
    """Number, whether it leads, colour and hatch, from left to right."""
    axes = draw({"layers": [layer], "compress": {"method": "m_smoe"}}).axes[0]
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    texts = sorted(axes.texts, key=lambda text: text.get_position()[0])
    patches.sort(key=lambda patch: patch.get_x())
    triangles = {float(line.get_xdata()[0]) for line in axes.lines}
    assert triangles == {text.get_position()[0] for text in texts if text.get_weight() == "bold"}
    return [
        (text.get_text(), text.get_weight() == "bold", to_rgb(patch.get_facecolor()), patch.get_hatch())
        for text, patch in zip(texts, patches, strict=True)
    ]


def test_groups_are_side_by_side_and_leaders_marked() -> None:
    cells = cells_of(MERGED)
    assert [cell[0] for cell in cells] == ["1", "3", "0", "2"]
    assert [cell[0] for cell in cells if cell[1]] == ["1", "2"]
    assert cells[0][2] == pytest.approx(to_rgb(COLOURS[0])), "the most used expert has the full colour of its group"
    assert sum(cells[1][2]) > sum(cells[0][2]), "an unused one a faint one"
    assert all(cell[3] is None for cell in cells)


def test_removed_experts_are_hatched() -> None:
    cells = cells_of(PRUNED)
    assert [(cell[0], cell[3] is not None) for cell in cells] == [("1", False), ("2", False), ("0", True), ("3", True)]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/x\.png cannot be written"):
        write_picture({"layers": [MERGED], "compress": {"method": "m_smoe"}}, tmp_path / "none" / "x.png")
