"""The code is as it is said to be: formatted, typed, on its floors, and documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = [path for root in ("dist_moe", "launch") for path in sorted((REPOSITORY / root).rglob("*.py"))]
LONGEST_FILE = 500


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy", "lint-imports"],
)
def test_checkers_have_nothing_to_say(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run(
        [Path(sys.executable).parent / program, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def public(nodes: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def says_something(function: ast.FunctionDef) -> bool:
    """Whether it does more than a line or two that explain themselves."""
    return function.end_lineno is not None and function.end_lineno - function.body[0].lineno >= 3


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text().strip()], ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [] if ast.get_docstring(tree) else ["the module"]
    for node in public(tree.body):
        must = isinstance(node, ast.ClassDef) or says_something(node)
        if must and not ast.get_docstring(node):
            bare.append(node.name)
    assert bare == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
