"""Setting single fields of a configuration from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_moe.config.plain_yaml import DEPTH_LIMIT, Content, parse_yaml
from dist_moe.errors import UserError, shown


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return values by dotted name, in the order in which they are to be set; of a name given twice the last one.

    ``overrides``: texts ``key.subkey=value``, values in YAML. Raises UserError for one that is not of that form.
    """
    assignments: dict[str, Any] = {}
    for key, value in map(_parse, overrides):
        assignments.pop(key, None)  # the last one, at the last place: a=.. a.b=.. is not a.b=.. a=..
        assignments[key] = value
    return assignments


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > DEPTH_LIMIT or any(letter.isspace() for letter in key):
        raise UserError(f"override {shown(override)} is not of the form key=value, for example train.batch_size=256")
    if not text.strip() or text.lstrip().startswith("#"):  # as from an unset variable of a shell
        raise UserError(f"override {shown(override)} gives no value; write {shown(key)[1:-1]}=null if null is meant")
    return key, parse_yaml(text, f"the value of override {shown(override)}")


def assign(content: Content, dotted_key: str, value: Any) -> None:
    """Set one field, making the sections above it where they are absent or null; a text is a section's name.

    Raises UserError where a list, a number or a truth value stands for a section above it.
    """
    *sections, last = dotted_key.split(".")
    for i, section in enumerate(sections):
        above = content.get(section)
        if above is None or isinstance(above, str):
            content[section] = {} if above is None else {"name": above}
        elif not isinstance(above, dict):
            name = ".".join(sections[: i + 1])
            remedy = "give the whole list" if isinstance(above, list) else "it has no fields"
            raise UserError(f"override {shown(dotted_key)}: {shown(name)} is {shown(above)}, no section; {remedy}")
        content = content[section]
    content[last] = value
