"""The picture of docs/architecture.md is that of the source, and the functions that it names exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.commands import REPOSITORY
from tools.draw_architecture import PICTURE, House, draw, survey

PAGE = (REPOSITORY / "docs/architecture.md").read_text()
FUNCTION = re.compile(r"^\| `([\w.]+)` \| `(dist_moe/[\w/]+\.py)` \|", re.MULTILINE)
WAYS = [FUNCTION.findall(section) for section in PAGE.split("\n## ")[1:]]


def drawn(picture: str) -> dict[str, set[str] | list[str]]:
    """Return floors from the top, rooms and arrows of a picture, without counts and places."""
    return {
        "floors": re.findall(r'class="floor" data-name="([^"]+)"', picture),
        "rooms": set(re.findall(r'class="room" data-name="([^"]+)"', picture)),
        "arrows": set(re.findall(r'class="arrow" (data-from="[^"]+" data-to="[^"]+")', picture)),
    }


@pytest.fixture(scope="module")
def house() -> House:
    return survey()


def test_the_picture_is_that_of_the_source(house: House) -> None:
    assert drawn(PICTURE.read_text()) == drawn(draw(house)), "run: python tools/draw_architecture.py"


def test_it_shows_every_floor_every_folder_and_every_import(house: House) -> None:
    shown = drawn(draw(house))
    assert shown["rooms"] >= {
        str(folder.parent.relative_to(REPOSITORY / "dist_moe"))
        for folder in REPOSITORY.glob("dist_moe/*/__init__.py")
        if not folder.parent.is_symlink()
    }
    assert {"engine/checkpoint", "tasks/images", "errors"} <= set(shown["rooms"])
    assert (shown["floors"][0], len(shown["floors"])) == ("cli", len(house.floors))  # type: ignore[index]
    assert len(shown["arrows"]) == len(house.imports) > 30
    assert all(start < stop for start, stop in house.imports)


@pytest.mark.parametrize("way", WAYS, ids=["batch", "field", "expert"])
def test_a_way_takes_at_most_twelve_functions_which_exist(way: list[tuple[str, str]]) -> None:
    assert 8 <= len(way) <= 12
    for function, file in way:
        nodes = ast.parse((REPOSITORY / file).read_text()).body
        for name in function.split("."):
            (found,) = [n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
            nodes = found.body
        assert isinstance(found, ast.FunctionDef)
