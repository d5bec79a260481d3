"""Small files written at once, and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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
