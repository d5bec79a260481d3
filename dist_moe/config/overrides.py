"""Reading YAML, and setting single fields of it from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dist_moe.errors import UserError

Content = dict[str, Any]


def read_yaml(path: Path) -> Content:
    """The mapping in ``path``; UserError if it cannot be read, is not YAML or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} must hold 'key: value' pairs, not a {type(content).__name__}")
    return content


def parse_override(override: str) -> tuple[str, Any]:
    """``key.subkey=value`` -> (dotted key, value read as YAML)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example train.batch_size=256")
    try:
        return key, _number_or(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from error


def assign(content: Content, dotted_key: str, value: Any) -> None:
    """Set one field, making the sections above it where they are absent or null."""
    *sections, last = dotted_key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[last] = value


def _number_or(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
