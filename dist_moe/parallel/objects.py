"""Small objects as bytes that ranks exchange: text, never code.

Whoever unpickles what arrives runs what the sender wants. Here what arrives can only become None, a boolean, a number,
a string, a list, a tuple or a dict of these, and it comes back with its type: not numbers, infinities, integers as
keys, and strings that are no Unicode too.
"""

from __future__ import annotations

import json
from typing import Any

_PLAIN = (type(None), bool, int, float, str)


def object_bytes(x: Any) -> bytes:
    """Return ``x`` as bytes; raises TypeError if it is, or holds, an object of any other kind, subclasses included."""
    return json.dumps(_tagged(x)).encode("ascii")


def object_of(octets: bytes) -> Any:
    """Return the object that :func:`object_bytes` wrote."""
    return _untagged(json.loads(octets))


def _tagged(x: Any) -> Any:
    """Return ``x`` with lists, tuples and dicts as [name of the type, members]: JSON knows no tuples, nor such keys."""
    if type(x) in _PLAIN:
        return x
    if type(x) in (list, tuple):
        return [type(x).__name__, [_tagged(one) for one in x]]
    if type(x) is dict:
        return ["dict", [[_tagged(key), _tagged(value)] for key, value in x.items()]]
    raise TypeError(
        f"ranks exchange None, booleans, numbers, strings, lists, tuples and dicts, got {type(x).__qualname__}"
    )


def _untagged(x: Any) -> Any:
    if not isinstance(x, list):
        return x
    kind, members = x
    if kind == "dict":
        return {_untagged(key): _untagged(value) for key, value in members}
    made = [_untagged(one) for one in members]
    return tuple(made) if kind == "tuple" else made
