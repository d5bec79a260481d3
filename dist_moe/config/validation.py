"""From plain YAML content to a validated section, and from what is wrong with it to sentences."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dist_moe.config.listing import KEY, fields_of, registry_of
from dist_moe.config.overrides import assign, parse_overrides
from dist_moe.config.plain_yaml import Content
from dist_moe.config.registry import UNKNOWN_NAME
from dist_moe.config.settings import Settings
from dist_moe.errors import UserError, shown

S = TypeVar("S", bound=Settings)

SHOWN_FAULTS = 10
"""Faults of a configuration that are told at once."""

SHOWN_CHARACTERS = 800
"""Length at which the sentence about a fault is cut, as it may repeat a value of any length."""


def validate(config: type[S], content: Content) -> S:
    """Return ``content`` as a ``config``; UserError with a line per field that is unknown, mistyped or out of range."""
    try:
        return config.model_validate(content)
    except ValidationError as error:
        faults = error.errors()
        lines = [line[:SHOWN_CHARACTERS] for line in (_explain(one, config, content) for one in faults[:SHOWN_FAULTS])]
        lines += [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from error


def validate_section(section: type[S], overrides: Sequence[str]) -> S:
    """Return a single section from ``key=value`` overrides of its defaults; raises UserError as :func:`validate`."""
    return validate(section, parse_overrides(overrides))


def override(config: type[BaseModel], content: Content, assignments: Mapping[str, Any]) -> None:
    """Set fields of ``content`` by their dotted names.

    A registered section that is switched by its name alone keeps what fields it shares with the new one.
    """
    for key, value in assignments.items():
        if key.endswith(".name"):
            _drop_fields_of_another(config, content, key.removesuffix(".name"), value)
    for key, value in assignments.items():
        assign(content, key, value)


def _drop_fields_of_another(config: type[BaseModel], content: Content, dotted: str, name: Any) -> None:
    """Prepare the section ``dotted`` of ``content`` for being called ``name`` from now on."""
    above, section, known = content, content, config
    *_, last = parts = dotted.split(".")
    for part in parts:
        field, value = known.model_fields.get(part), section.get(part)
        registry = registry_of(field) if field else None
        if registry is None or value is None:
            return
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return
        above, section = section, value
        found = registry.get(value.get("name", registry.default))
        known = found or registry.base
    new = registry.get(name) if registry else None
    if new is not None and section.get("name") != name:
        above[last] = {key: value for key, value in section.items() if key in new.model_fields}


def import_modules(names: Any) -> None:
    """Import the modules under ``imports``, also from the working directory. Raises UserError if one cannot be."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return  # absent, or a mistake that validation explains
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's own module may do wrong
            kind = type(error).__name__
            raise UserError(
                f"imports: the module {name!r} cannot be imported: {kind}: {error}; {_import_remedy(name, error)}"
            ) from error


def _import_remedy(name: str, error: BaseException) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        return (
            f"it is searched for in the working directory {Path.cwd()} and on PYTHONPATH: start from the directory "
            f"that holds {missing}, or put that directory on PYTHONPATH"
        )
    return f"install {missing}" if missing is not None else "fix the module, or take it out of imports"


def _explain(error: Any, config: type[Settings], content: Content) -> str:
    path, kind, context = _path(error, content), error["type"], error.get("ctx", {})
    field = ".".join(path)
    if kind == "missing":
        return f"{field}: required, but not given"
    if kind == UNKNOWN_NAME:
        return f"{field}.{error['msg']}"
    if kind == "extra_forbidden":
        return f"{field}={shown(error['input'])}: there is no such field{_hint(path, config)}"
    if kind == "union_tag_not_found":
        return f"{field}.{_words(context['discriminator'])}: required, but not given"
    if kind == "union_tag_invalid":
        tag = _words(context["discriminator"])
        return f"{field}.{tag}={shown(error['input'][tag])}: allowed: {_words(context['expected_tags'])}"
    if kind == "literal_error" and error["loc"][-1] == "[key]":
        return f"{field}: there is no such field; allowed: {_words(context['expected'])}"
    message = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list, for example '[a, b]'")
    message = re.sub(r"(valid path) for <.*>$", r"\1", message)
    message = re.sub(r"^(Input should be a )valid dictionary\b.*$", r"\1mapping, for example '{a: b}'", message)
    message = re.sub(r"^(Tuple|List|Dictionary)( should have .*) after validation", r"it\2", message)
    return f"{field}={shown(error['input'])}: {message[0].lower() + message[1:]}"


def _words(quoted: str) -> str:
    return quoted.replace("'", "")


def _path(error: Any, content: Any) -> list[str]:
    """Return where in ``content`` an error is: pydantic's place without what is not of it, such as tags of unions."""
    path = list[str]()
    for place, part in enumerate(error["loc"], 1):
        keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
        inside = part in keys
        if inside or (place == len(error["loc"]) and error["type"] == "missing"):
            path.append(str(part))
            content = content[part] if inside else None
    return path


def _hint(path: Sequence[str], config: type[Settings]) -> str:
    """Return what to try in place of a field that there is not."""
    field = ".".join(path)
    known = [_filled(one.name, path) for one in fields_of(config)]
    if field in known:  # of another kind of the same section
        section = field.rpartition(".")[0]
        tag = "type" if f"{section}.type" in known else "name"
        return f" with this {section}.{tag}; see 'dist-moe config --fields'"
    near = difflib.get_close_matches(field, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; see 'dist-moe config --fields'"


def _filled(name: str, path: Sequence[str]) -> str:
    """Return a field's name as the listing has it with the keys of ``path`` for those of mappings."""
    return ".".join(path[i] if part == KEY and i < len(path) else part for i, part in enumerate(name.split(".")))
