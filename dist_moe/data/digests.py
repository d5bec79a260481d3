"""Digests that tell data in memory from any other: of arrays, plain values, and objects and containers of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from os import PathLike
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_OPAQUE = (type, FunctionType, MethodType, ModuleType, PathLike)
"""Kinds whose attributes say nothing of data."""


def digest_of_content(value: Any) -> str:
    """Return a SHA-256 in hexadecimal over all that ``value`` holds.

    Tensors and arrays count by dtype, shape and values; mappings by their items; objects by their attributes, data
    classes by their fields. Paths, functions and what holds nothing that can be read
    do not count: where files lie does not change what is in them.
    """
    sha256 = hashlib.sha256()
    _add(sha256, value, ())
    return sha256.hexdigest()


def _add(sha256: Any, value: Any, inside: tuple[int, ...]) -> None:
    """Hash kind, size and content. ``inside``: ids of the objects around ``value``, which are not entered again."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        plain = (plain.to_dense() if plain.layout is not torch.strided else plain).contiguous()
        _head(sha256, "tensor", plain.dtype, tuple(plain.shape))
        sha256.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _head(sha256, "array", value.dtype.str, value.shape)
        sha256.update(_bytes_of(value))
    elif value is None or isinstance(value, bool | int | float | complex | np.generic):
        _head(sha256, kind.__name__, repr(value))
    elif isinstance(value, str | bytes):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        _head(sha256, kind.__name__, len(content))
        sha256.update(content)
    elif id(value) in inside:
        _head(sha256, "again", inside[::-1].index(id(value)))
    else:
        _add_parts(sha256, value, (*inside, id(value)))


def _add_parts(sha256: Any, value: Any, inside: tuple[int, ...]) -> None:
    """Hash what consists of others: containers and objects."""
    parts: list[Any]
    kind = "row"  # no name of a class: who renames one changes no data
    if isinstance(value, set | frozenset):
        parts = sorted(map(digest_of_content, value))
    elif isinstance(value, np.ndarray):
        parts = [value.shape, *value.reshape(-1).tolist()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, _OPAQUE):
        parts = []
    else:
        kind, parts = "items", [part for item in _items_of(value) for part in item]
    _head(sha256, kind, len(parts))
    for part in parts:
        _add(sha256, part, inside)


def _items_of(value: Any) -> list[tuple[Any, Any]]:
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    items = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return sorted(items.items(), key=lambda item: str(item[0]))


def _head(sha256: Any, *what: Any) -> None:
    sha256.update(f"{' '.join(map(str, what))}\n".encode())


def _bytes_of(array: NDArray[Any]) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
