"""All fields of a configuration, those of every registered section included: to look up, to list."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_moe.config.registry import Registry
from dist_moe.errors import UserError

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NULL = "null"
KEY = "NAME"
"""The word that stands, in a field's name, for a mapping's key, which the user chooses."""


@dataclass(frozen=True)
class NamedField:
    """A field by its dotted ``name``, with ``[]`` behind lists and NAME for the keys of mappings.

    ``owner``: the name or type of the section that has it; None if all have. ``tells_kind``: it is such a name or type.
    """

    name: str
    owner: str | None
    info: FieldInfo
    tells_kind: bool

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
        yield NamedField(prefix + name, owner, info, name == _tag_of(model)[0])
        kinds = _sections(info)
        inner = "[]" if get_origin(info.annotation) is tuple else f".{KEY}" if _values(info) else ""
        for kind in kinds:
            yield from fields_of(kind, f"{prefix}{name}{inner}.", _tag_of(kind)[1] if len(kinds) > 1 else owner)


def field_listing(models: Sequence[type[BaseModel]], prefix: str = "") -> str:
    """Return a paragraph for each field whose name begins with ``prefix``: name, type and range, default, meaning.

    ``models``: classes of configurations; what several of them have is listed once. Fields that not every kind of their
    section has are followed by the kinds that do. Raises UserError if there is no such field.
    """
    known = [field for model in models for field in fields_of(model)]
    fields = [f for f in known if f.name.startswith(prefix) and (_values(f.info) or not _sections(f.info))]
    if not fields:
        near = difflib.get_close_matches(prefix, [f.name for f in known], n=1, cutoff=0)
        raise UserError(f"--fields {prefix}: no field begins so; did you mean {near[0]}?")
    names: dict[str, list[str]] = {}
    owners: dict[str, list[str]] = {}
    for field in fields:
        if field.tells_kind:
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


def _tag_of(kind: type[BaseModel]) -> tuple[str, str] | tuple[None, None]:
    """Return the field that tells a kind of section from others, and what it says by default or first."""
    for tag in ("name", "type"):
        info = kind.model_fields.get(tag)
        if info is not None and get_origin(info.annotation) is Literal:
            return tag, str(get_args(info.annotation)[0] if info.is_required() else info.default)
    return None, None


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the kinds of section that a field can hold, itself or as values of a mapping."""
    registry = registry_of(info)
    if registry is not None:
        return list(registry.classes)
    members = _members(_values(info) or info.annotation)
    return [kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _values(info: FieldInfo) -> Any:
    """Return the annotation of the values of a mapping, None for a field of another kind."""
    return get_args(info.annotation)[1] if _is_mapping(info.annotation) else None


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) in (dict, Mapping)


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
        return " | ".join(dict.fromkeys(map(_kind, members)))
    if annotation is type(None):
        return _NULL
    origin = get_origin(annotation)
    if origin is tuple:
        inner = [_kind(member) for member in get_args(annotation) if member is not Ellipsis]
        return f"[{', '.join(inner)}{', ...' if Ellipsis in get_args(annotation) else ''}]"
    if _is_mapping(annotation):
        key, value = get_args(annotation)
        return f"{{{KEY if key is str else _kind(key)}: {_kind(value)}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "Path": "path", "Any": "..."}.get(annotation.__name__, annotation.__name__)


def _shown(value: Any) -> str:
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(one)}' for key, one in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else str(value)
