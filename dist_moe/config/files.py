"""Small files read and written at once, JSON that is JSON, and digests of files.

JSON has no word for infinity and not-a-number. All JSON of this package is written here: such a number becomes null,
and the object in which it stood says so in a field of its own, from which :func:`parse_json` brings it back:

    {"not_finite": {"loss": "nan", "load": {"1": "inf"}}, "loss": null, "load": [1.0, null]}
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError

NOT_FINITE = "not_finite"
"""The field of an object that says which of its numbers were not finite, and what they were."""


def absolute(path: Path) -> Path:
    """Return a path of the user's with ``~`` spelled out. Raises UserError if that stands for nobody's directory."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"{path}: there is no such home directory (HOME is not set, or this user is not known to the machine); "
            "set HOME, or write the path out"
        ) from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises OSError also for a pipe, a device or a socket: to read it may never end."""
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raise OSError if ``path`` is a pipe, a device or a socket, or if nothing is there."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of another program. Raises OSError, and ValueError for any other content."""
    try:
        content = json.loads(read_bytes(path).decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for name, value in content.items():
        if not is_finite(value):
            raise ValueError(f"{name}={value!r}: JSON has finite numbers only")
    return content


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(content: Any, *, indent: int = 2, sort_keys: bool = False) -> str:
    """Return ``content`` as indented JSON with a final newline."""
    return _dumps(content, indent=indent, sort_keys=sort_keys) + "\n"


def json_line(content: Any, *, sort_keys: bool = False, blanks: bool = True) -> str:
    """Return ``content`` as JSON in one line, without a newline; ``blanks``: one after each comma and colon."""
    return _dumps(content, sort_keys=sort_keys, separators=None if blanks else (",", ":"))


def _dumps(content: Any, **options: Any) -> str:
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:  # the rule is that all is finite: only then is it gone through in Python
        return json.dumps(finite(content), allow_nan=False, **options)


def parse_json(text: str | bytes) -> Any:
    """Return the content of JSON text (UTF-8), with the numbers that are not finite. Raises ValueError."""
    text = text if isinstance(text, str) else text.decode()
    try:
        content = json.loads(text)
        return restored(content) if f'"{NOT_FINITE}"' in text else content
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError, naming it, if it cannot be read or is no JSON."""
    try:
        return parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON by :func:`replace_text`."""
    replace_text(path, json_text(content))


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one rename: a process that is killed meanwhile leaves the old file, or none."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # stages at once write the same file
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def is_finite(content: Any) -> bool:
    """Return whether all numbers are finite in plain content: dicts, lists and what they hold."""
    if isinstance(content, float):
        return math.isfinite(content)
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return all(map(is_finite, parts))


def finite(content: Any) -> Any:
    """Return ``content`` with null for every number that is not finite, and with the fields that say so."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, list | tuple):
        return [finite(one) for one in content]
    if not isinstance(content, dict):
        return content
    told = {str(name): words for name, value in content.items() if (words := _words(value))}
    return ({NOT_FINITE: told} if told else {}) | {name: finite(value) for name, value in content.items()}


def _words(value: Any) -> Any:
    """Return the word for a number that is not finite; of a list, those in it by index; None if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, list | tuple):
        return {str(index): words for index, one in enumerate(value) if (words := _words(one))} or None
    return None


def restored(content: Any) -> Any:
    """Return ``content`` with what its fields NOT_FINITE tell in the places of null."""
    if isinstance(content, list):
        return [restored(one) for one in content]
    if not isinstance(content, dict):
        return content
    plain = {name: restored(value) for name, value in content.items()}
    if NOT_FINITE not in plain:
        return plain
    told = plain.pop(NOT_FINITE)
    try:
        return plain | {name: _number(plain[name], words) for name, words in told.items()}
    except (LookupError, ValueError, AttributeError):  # a field of somebody else's that has this name
        return plain | {NOT_FINITE: told}


def _number(value: Any, words: Any) -> Any:
    if value is None and words in ("nan", "inf", "-inf"):
        return float(words)
    if not isinstance(value, list) or not isinstance(words, dict):
        raise ValueError(words)
    numbers = {int(index): _number(value[int(index)], word) for index, word in words.items()}
    return [numbers.get(index, one) for index, one in enumerate(value)]
