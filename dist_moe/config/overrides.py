"""Reading YAML, and setting single fields of it from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dist_moe.errors import UserError

Content = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the floats of YAML 1.2: ``1e-3`` is a number wherever it stands."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Content:
    """Return the mapping in ``path``; UserError if it cannot be read, is not YAML or not a mapping."""
    try:
        content = _parse(path.read_text(encoding="utf-8"))
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
    """``key.subkey=value`` -> (dotted key, value read as YAML). Raises UserError if it is not of that form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example train.batch_size=256")
    try:
        return key, _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from error


def assign(content: Content, dotted_key: str, value: Any) -> None:
    """Set one field, making the sections above it where they are absent or null; a text is a section's name."""
    *sections, last = dotted_key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {"name": content[section]} if isinstance(content.get(section), str) else {}
        content = content[section]
    content[last] = value


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)
