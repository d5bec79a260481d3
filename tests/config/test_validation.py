"""Sentences about a wrong section name fields as the user wrote them, in none of pydantic's words."""

from __future__ import annotations

from typing import Any

import pytest

from dist_moe.errors import UserError
from dist_moe.recipes.recipe import validate_config

TABLE = {
    "name": "table",
    "files": "t.csv",
    "columns": {"x": {"type": "numeric"}},
    "targets": {"buy": {"type": "binary"}},
}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"targets": {"buy": {"type": "binary", "positiv": [1]}}},
            "targets.buy.positiv=[1]: there is no such field; did you mean data.targets.buy.positive?",
        ),
        (
            {"columns": {"list": {"type": "list", "buckets": 3}}},
            "columns.list.buckets=3: there is no such field with this data.columns.list.type; "
            "see 'dist-moe config --fields'",
        ),
        (
            {"columns": {"a.b": {"type": "numeric", "bucket": 3}}},
            "columns.a.b.bucket=3: there is no such field; did you mean data.columns.a.b.buckets?",
        ),
        (
            {"columns": {"list": {"type": "list", "length": 0}}},
            "columns.list.length=0: input should be greater than or equal to 1",
        ),
        ({"columns": {"x": {"type": "category"}}}, "columns.x.type='category': allowed: categorical, numeric, list"),
        ({"columns": {"x": {"type": ["list"]}}}, "columns.x.type=['list']: allowed: categorical, numeric, list"),
        ({"columns": {"x": {}}}, "columns.x.type: required, but not given"),
        ({"columns": {"x": "numeric"}}, "columns.x='numeric': input should be a mapping, for example '{a: b}'"),
        ({"columns": {}}, "columns={}: it should have at least 1 item, not 0"),
        ({"split": 3}, "split=3: input should be a mapping, for example '{a: b}'"),
        ({"files": {"training": "t"}}, "files.training: there is no such field; allowed: train, val or test"),
        (
            {"split": {"values": {"dev": ["x"]}}},
            "split.values.dev: there is no such field; allowed: train, val or test",
        ),
        ({"files": [1]}, "files.0=1: input is not a valid path"),
    ],
)
def test_sentences(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        validate_config({"data": TABLE | wrong, "model": {"name": "mmoe"}})
    assert str(refusal.value) == f"the configuration is not valid:\n  data.{sentence}"
