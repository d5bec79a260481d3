"""What the pages refer to exists: links, files, names of the package, options and fields in commands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from dist_moe.cli.main import _parse
from dist_moe.config.listing import fields_of
from dist_moe.config.plain_yaml import read_yaml
from dist_moe.recipes import RECIPES
from dist_moe.recipes.recipe import set_fields, validate_config
from tests.helpers.commands import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md")), *sorted(REPOSITORY.glob("examples/*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")
FILE = re.compile(r"`((?:dist_moe|tests|tools|launch|examples|configs|results)/[\w/]*\w(?:\.\w+)?/?)`")
NAME = re.compile(r"`(dist_moe(?:\.\w+)+)`|^from (dist_moe[\w.]*) import (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"`((?:recipe|data|model|start|train|parallel|placement|swap_search)(?:\.\w+)+)")
NOT_COMMITTED = {"results/gpu.md"}
"""Files that a command of the page writes."""
NO_FIELDS = {
    "placement.md",
    "model.auxiliary",
    "model.safetensors",
    "model.train",
    "model.num_parameters",
    "placement.experts_of",
    "train.tsv",
}
"""Files, and names in Python."""


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def names_in(text: str) -> list[str]:
    """Return dotted names of the package, also those that examples import."""
    found = [(quoted, module, imported) for quoted, module, imported in NAME.findall(text)]
    lists = [(module, one.strip()) for _, module, imported in found for one in imported.split(",") if one.strip()]
    return [quoted for quoted, _, _ in found if quoted] + [f"{module}.{one}" for module, one in lists]


def exists(dotted: str) -> bool:
    """Whether a module, or what a module has, is called that."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(thing, attribute):
                return False
            thing = getattr(thing, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_files_and_names(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if not link.startswith("http")]
    stale = [link for link in links if not (page.parent / link).exists()]
    stale += [file for file in FILE.findall(text) if not (REPOSITORY / file).exists() and file not in NOT_COMMITTED]
    stale += [name for name in names_in(text) if not exists(name)]
    assert stale == []


def test_fields() -> None:
    listed = {field.name for recipe in RECIPES.classes for field in fields_of(recipe.configuration)}
    named = {field for page in PAGES for field in FIELD.findall(page.read_text())} - NO_FIELDS
    assert len(named) > 40
    assert named <= listed


def test_there_is_much_to_find() -> None:
    texts = [page.read_text() for page in PAGES]
    assert sum(len(LINK.findall(text)) for text in texts) > 80
    assert sum(len(FILE.findall(text)) for text in texts) > 100
    assert sum(len(names_in(text)) for text in texts) > 40
    assert not exists("dist_moe.recipes.no_such_thing")


def commands() -> list[str]:
    """Return the commands of all pages that train from a configuration in the repository."""
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return sorted({line.partition(" #")[0].strip() for line in lines if re.match("dist-moe train .*configs/", line)})


def test_there_are_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_a_command_is_valid(command: str) -> None:
    options = _parse(shlex.split(command)[1:])
    content = read_yaml(REPOSITORY / options.config)
    set_fields(content, options.overrides)
    validate_config(content).check(options.emulate or 1)
