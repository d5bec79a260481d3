"""Single fields from the command line: their form, their order, and what they cannot set."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config.overrides import assign, parse_overrides
from dist_moe.errors import UserError
from dist_moe.recipes import load_config


@pytest.mark.parametrize("override", ["", "a", "=", "=x", ".a=1", "a.=1", "a..b=1", " a=1", "a b=1", "a.b =1", "a\n=1"])
def test_not_a_name_and_a_value(override: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form key=value, for example train\.batch_size=256"):
        parse_overrides([override])


@pytest.mark.parametrize("override", ["data.root=", "data.root=  ", "data.root=#mine"])
def test_no_value_is_not_taken_for_null(override: str) -> None:
    with pytest.raises(UserError, match=r"gives no value; write data\.root=null if null is meant"):
        parse_overrides([override])


@pytest.mark.parametrize("override", ["a." * 1000 + "a=1", "a" * 10**6, f"a={'[' * 10**6}", f"a={'9' * 10**6}"])
def test_long_ones_are_refused_in_short(override: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_overrides([override])
    assert len(str(refusal.value)) < 300


def test_the_last_one_counts_and_stands_last() -> None:
    assert parse_overrides(["a=1", "b=2", "a=3"]) == {"b": 2, "a": 3}
    content: dict[str, Any] = {}
    for name, value in parse_overrides(["a.b=1", "a={c: 2}", "a.b=3"]).items():
        assign(content, name, value)
    assert content == {"a": {"c": 2, "b": 3}}


@pytest.mark.parametrize(
    ("content", "remedy"),
    [({"a": [1]}, "a' is \\[1\\], no section; give the whole list"), ({"a": 5}, "no section; it has no fields")],
)
def test_a_field_below_what_has_none(content: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        assign(content, "a.0.b", 3)


@pytest.mark.parametrize("name", ["data", "model", "model.gate", "model.experts", "recipe", "start", "swap_search"])
@pytest.mark.parametrize(
    "value", ["[1]", "{a: [b]}", "3", "null", "true", "1.5", "''", "[[]]", "{name: {name: comet}}"]
)
@pytest.mark.parametrize("ending", ["", ".name"])
def test_a_section_of_any_value(tmp_path: Path, name: str, value: str, ending: str) -> None:
    """It is refused with a sentence, or taken: nothing else."""
    (tmp_path / "a.yaml").write_text("model: {gate: top_k}\n")
    with suppress(UserError):
        load_config(tmp_path / "a.yaml", [f"{name}{ending}={value}"])
