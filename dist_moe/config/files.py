"""Small files read and written at once, and digests of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError


def absolute(path: Path) -> Path:
    """Return a path of the user's with ``~`` spelled out. Raises UserError if that stands for nobody's directory."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"the path {path} cannot be followed: {error}; write it without ~") from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises OSError also for a pipe, a device or a socket: to read it may never end."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError, and ValueError for other content, however deep it is."""
    try:
        content = json.loads(read_bytes(path).decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(content: Any) -> str:
    """Return ``content`` as indented JSON with a final newline."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON by :func:`replace_text`."""
    replace_text(path, json_text(content))


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one rename: a process that is killed meanwhile leaves the old file, or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
