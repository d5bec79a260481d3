"""JSON that is JSON: no NaN and no Infinity in any file of ours, and what was there comes back."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.config.files import finite, json_line, json_text, parse_json, read_json, restored
from dist_moe.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FLOATS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf])
NAMES = st.text(max_size=4) | st.sampled_from(["loss", "load", "load[0]", "not_finite", "a[0][1]"])
CONTENT = st.recursive(
    FLOATS | st.none() | st.text(max_size=3) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES.filter(lambda n: n != "not_finite"), inner),
    max_leaves=12,
)


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES.filter(lambda n: n != "not_finite"), CONTENT, max_size=4))
def test_any_object_is_json_and_comes_back(content: dict[str, Any]) -> None:
    for text in (json_line(content), json_text(content)):
        strict(text)
        assert same(parse_json(text), content)
        assert same(parse_json(text.encode()), content)
    assert same(restored(finite(content)), content)
    assert "\n" not in json_line(content)


def test_the_object_says_what_is_not_finite_and_where() -> None:
    content = {"step": 3, "loss": math.nan, "load": [[1.0, math.inf]], "test": {"auc": -math.inf, "mse": 2.0}}
    assert strict(json_line(content)) == {
        "step": 3,
        "loss": None,
        "load": [[1.0, None]],
        "test": {"auc": None, "mse": 2.0, "not_finite": {"auc": "-inf"}},
        "not_finite": {"loss": "nan", "load": {"0": {"1": "inf"}}},
    }


def test_a_list_has_no_place_to_say_it() -> None:
    assert strict(json_line([1.0, math.nan, {"a": math.inf}])) == [1.0, None, {"a": None, "not_finite": {"a": "inf"}}]


@pytest.mark.parametrize(
    "told",
    [
        {"gone": "nan"},
        {"a": "nan"},
        {"b": "1e3"},
        {"b": ["nan"]},
        {"b": {"0": "nan"}},
        {"c": {"7": "nan"}},
        "nan",
        3,
        None,
    ],
)
def test_a_field_that_tells_something_else_is_left_alone(told: Any) -> None:
    content = {"a": 1.0, "b": None, "c": [None], "not_finite": told}
    assert parse_json(json.dumps(content)) == content


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[" * 100_000, b"9" * 5_000, "\u00e4".encode("utf-16")])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json cannot be read"):
        read_json(tmp_path / "result.json")


def test_json_is_written_in_one_place() -> None:
    """Elsewhere json.dump and json.dumps would let NaN through, as tools that make odd files do on purpose."""
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for folder in ("dist_moe", "tools", "launch", "examples")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if path != REPOSITORY / "dist_moe/config/files.py" and not path.name.startswith(("fuzz", "mutate"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps"))
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
    ]
    assert found == []
