"""Kinds of values of the user's DeepSpeed configuration: what a field may hold, and a phrase that says so."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dist_moe.errors import UserError

LARGEST = 2**31 - 1
"""The largest count of steps, and the largest number of elements of a buffer."""


@dataclass(frozen=True)
class Kind:
    """A kind of values. ``phrase``: completes "it must be". ``holds``: whether a value is of it, whatever it is."""

    phrase: str
    holds: Callable[[Any], bool]


def number(bounds: str, within: Callable[[float], bool]) -> Kind:
    """Return the kind of finite numbers, not truth values, for which ``within`` holds, as ``bounds`` says in words."""
    return Kind(f"a number {bounds}", lambda v: _is_number(v) and within(v))


def whole(least: int, most: int = LARGEST) -> Kind:
    """Return the kind of whole numbers from ``least`` to ``most``."""
    return Kind(
        f"a whole number from {least} to {most}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most,
    )


def size(least: int, most: int = LARGEST) -> Kind:
    """Return the kind of whole numbers from ``least`` to ``most`` that may be written as 5e8 too."""
    exact = whole(least, most)
    return Kind(exact.phrase, lambda v: exact.holds(int(v) if _is_number(v) and v == int(v) else v))


def one_of(*allowed: Any) -> Kind:
    """Return the kind of exactly these values; true is not 1."""
    return Kind(
        f"one of {', '.join(map(str, allowed))}",
        lambda v: any(type(v) is type(one) and v == one for one in allowed),
    )


def pair(each: Kind) -> Kind:
    """Return the kind of lists of two values of the kind ``each``."""
    return Kind(
        f"a list of two, each {each.phrase}",
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(each.holds, v)),
    )


def several(each: Kind) -> Kind:
    """Return the kind of lists of one or more values of the kind ``each``."""
    return Kind(
        f"a list, each {each.phrase}", lambda v: isinstance(v, list | tuple) and bool(v) and all(map(each.holds, v))
    )


def _is_number(value: Any) -> bool:
    limit = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


FLAG = Kind("true or false", lambda v: isinstance(v, bool))
AT_LEAST_0 = number(">= 0", lambda v: v >= 0)
ABOVE_0 = number("> 0", lambda v: v > 0)
BELOW_1 = number(">= 0 and below 1", lambda v: 0 <= v < 1)
UP_TO_1 = number("from 0 to 1", lambda v: 0 <= v <= 1)


def check_kind(field: str, value: Any, kind: Kind) -> None:
    """Raise UserError unless ``value``, of ``deepspeed.{field}``, is of its kind."""
    if not kind.holds(value):
        raise UserError(f"deepspeed.{field}={written(value)} is refused: it must be {kind.phrase}")


def check_parameters(field: str, given: Any, kinds: Mapping[str, Kind], of: str) -> None:
    """Raise UserError unless every one of ``given``, keys and values under ``deepspeed.{field}``, is among ``kinds``.

    ``of``: whose parameters they are.
    """
    if not isinstance(given, dict):
        raise UserError(f"deepspeed.{field}={written(given)} must hold 'key: value' pairs")
    for key, value in given.items():
        if key not in kinds:
            raise UserError(f"deepspeed.{field}.{key}: {of} has no such parameter; {suggestion(key, kinds)}")
        check_kind(f"{field}.{key}", value, kinds[key])


def suggestion(name: Any, allowed: Collection[str]) -> str:
    """Return the end of a sentence about an unknown ``name``: the one that it looks like, or all that are allowed."""
    by_lower = {one.lower(): one for one in allowed}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.75)
    return (f"did you mean {by_lower[near[0]]}? " if near else "") + f"Allowed are {', '.join(allowed)}"


def written(value: Any) -> str:
    """Return ``value`` as a configuration file would have it, cut to 200 characters."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
