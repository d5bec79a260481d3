"""Objects that ranks exchange: each comes back as it was, or is refused; nothing is ever unpickled."""

from __future__ import annotations

import ast
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.parallel import gather_objects
from dist_moe.parallel.objects import object_bytes, object_of
from tests.helpers.commands import REPOSITORY

KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.tuples(st.integers())
OBJECTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inside: st.lists(inside) | st.lists(inside).map(tuple) | st.dictionaries(KEYS, inside),
)


def described(x: Any) -> Any:
    """The object with the types of all that it holds; not-a-numbers are equal here."""
    if isinstance(x, list | tuple):
        return type(x), [described(one) for one in x]
    if isinstance(x, dict):
        return dict, [(described(key), described(value)) for key, value in x.items()]
    return type(x), "nan" if isinstance(x, float) and math.isnan(x) else repr(x)


@settings(max_examples=60, deadline=None)
@given(OBJECTS)
def test_what_is_allowed_comes_back_as_it_was(x: Any) -> None:
    assert described(object_of(object_bytes(x))) == described(x)


@pytest.mark.parametrize(
    "x", [math.nan, math.inf, -math.inf, -0.0, 2**70, "\udce9\0", {1: (None,)}, {(1, "a"): {}}, (), []]
)
def test_odd_ones(x: Any) -> None:
    assert described(object_of(object_bytes(x))) == described(x)


@dataclass
class _Point:
    x: int = 0


@pytest.mark.parametrize(
    "x", [_Point(), {1}, b"x", 1j, np.float64(1), np.int64(1), torch.ones(1), OrderedDict(), object, print]
)
def test_others_are_refused_on_one_rank_too(x: Any) -> None:
    for wrapped in (x, [x], {"key": (x,)}):
        with pytest.raises(TypeError, match=f"got {type(x).__qualname__}"):
            gather_objects(wrapped)


FORBIDDEN = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list", "cloudpickle", "dill", "marshal", "shelve",
}  # fmt: skip
UNPICKLES = {"dist_moe/data/fetch/restricted_pickle.py"}
"""Reads published data sets, and builds nothing but arrays: tests/data/test_restricted_pickle.py."""


def names_in(source: str) -> set[str]:
    """Every name, attribute and imported module of a source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {*(alias.name for alias in node.names), getattr(node, "module", None) or ""}
    return found


def test_nothing_is_pickled_between_ranks() -> None:
    names = {
        str(path.relative_to(REPOSITORY)): names_in(path.read_text())
        for path in (REPOSITORY / "dist_moe").rglob("*.py")
    }
    assert {path: found & FORBIDDEN for path, found in names.items() if found & FORBIDDEN} == {}
    assert {path for path, found in names.items() if "pickle" in found} == UNPICKLES
    assert names_in("import torch.distributed as d; d.all_gather_object(x, y)") & FORBIDDEN  # it would be noticed
