"""Every test that docs/guarantees.md names exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.commands import REPOSITORY

NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REPOSITORY / "docs/guarantees.md").read_text())))


def test_there_are_promises() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_the_test_exists(file: str, test: str) -> None:
    module = ast.parse((REPOSITORY / file).read_text())
    tests = {node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert tests
    assert not test or test in tests
