"""All fields of a configuration, those of every registered section included: to look up, to list."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_moe.config.registry import Registry, names_of
from dist_moe.errors import UserError

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NULL = "null"


@dataclass(frozen=True)
class NamedField:
    """A field by its dotted ``name``. ``owner``: the registered name of the section that has it; None if all have."""

    name: str
    owner: str | None
    info: FieldInfo

    @property
    def allowed(self) -> str:
        """Type and range, for example ``int >= 1 | null`` or ``0 <= float < 1``."""
        bounds = {sign: getattr(m, key) for m in self.info.metadata for key, sign in _SIGNS.items() if hasattr(m, key)}
        kinds = [_kind(member) for member in _members(self.info.annotation)]
        kind = " | ".join(name for name in kinds if name != _NULL)
        if all(">" in sign for sign in bounds):
            ranged = " ".join([kind, *(f"{sign} {bound}" for sign, bound in bounds.items())])
        else:
            above = "".join(f"{bound} {sign.replace('>', '<')} " for sign, bound in bounds.items() if ">" in sign)
            ranged = above + kind + "".join(f" {sign} {bound}" for sign, bound in bounds.items() if "<" in sign)
        return f"{ranged} | {_NULL}" if _NULL in kinds else ranged

    @property
    def default(self) -> str:
        """The default value in words."""
        if self.info.is_required():
            return "required"
        value = self.info.get_default(call_default_factory=True, validated_data={})
        return "(its own)" if isinstance(value, BaseModel) else _shown(value)


def fields_of(model: type[BaseModel], prefix: str = "", owner: str | None = None) -> Iterator[NamedField]:
    """Yield the fields of ``model`` and, where a field is a section, those of each kind of section that it can be."""
    for name, info in model.model_fields.items():
        yield NamedField(prefix + name, owner, info)
        kinds = _sections(info)
        for kind in kinds:
            named = str(kind.model_fields["name"].default) if names_of(kind) else None
            inner = f"{prefix}{name}[]." if get_origin(info.annotation) is tuple else f"{prefix}{name}."
            yield from fields_of(kind, inner, named if len(kinds) > 1 else owner)


def field_listing(models: Sequence[type[BaseModel]], prefix: str = "") -> str:
    """Return a paragraph for each field whose name begins with ``prefix``: name, type and range, default, meaning.

    ``models``: classes of configurations; what several of them have is listed once. Fields that not every kind of their
    section has are followed by the kinds that do. Raises UserError if there is no such field.
    """
    known = [field for model in models for field in fields_of(model)]
    fields = [f for f in known if f.name.startswith(prefix) and not _sections(f.info)]
    if not fields:
        near = difflib.get_close_matches(prefix, [f.name for f in known], n=1, cutoff=0)
        raise UserError(f"--fields {prefix}: no field begins so; did you mean {near[0]}?")
    names: dict[str, list[str]] = {}
    owners: dict[str, list[str]] = {}
    for field in fields:
        if field.name.endswith(".name"):
            names.setdefault(field.name, []).append(field.allowed)
    for field in fields:
        if field.name in names:
            kinds = " | ".join(dict.fromkeys(names[field.name]))
            text = f"{field.name}: {kinds}\n    which kind it is; the fields depend on it"
        else:
            text = f"{field.name}: {field.allowed}, default {field.default}\n    {field.info.description}"
        owners.setdefault(text, []).extend([field.owner] if field.owner and field.name not in names else [])
    return "\n".join(
        text.replace("\n", f"  [{', '.join(dict.fromkeys(who))}]\n", 1) if who else text for text, who in owners.items()
    )


def registry_of(info: FieldInfo) -> Registry[Any] | None:
    """Return the registry that says what a field's section can be, None for a field of another kind."""
    marks = [*info.metadata, *(mark for member in _annotated(info.annotation) for mark in get_args(member)[1:])]
    return next((mark for mark in marks if isinstance(mark, Registry)), None)


def _annotated(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        for one in get_args(annotation):
            yield from _annotated(one)


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the kinds of section that a field can hold."""
    registry = registry_of(info)
    if registry is not None:
        return list(registry.classes)
    return [kind for kind in _members(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for one in get_args(annotation) for member in _members(one))
    return (annotation,)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    members = _members(annotation)
    if len(members) > 1:
        return " | ".join(map(_kind, members))
    if annotation is type(None):
        return _NULL
    origin = get_origin(annotation)
    if origin is tuple:
        inner = [_kind(member) for member in get_args(annotation) if member is not Ellipsis]
        return f"[{', '.join(inner)}{', ...' if Ellipsis in get_args(annotation) else ''}]"
    if origin is dict:
        return "mapping"
    return {"str": "text", "Path": "path"}.get(annotation.__name__, annotation.__name__)


def _shown(value: Any) -> str:
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
