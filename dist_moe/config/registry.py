"""Registries: what the ``name`` of a section of the configuration can mean, open to the user's own modules.

A registry holds settings classes by the literal values of their field ``name``. As the annotation of a field it
validates a mapping by the class that its ``name`` stands for:

    GATES = Registry("gate", GateSettings, default="comet")
    gate: Annotated[SerializeAsAny[GateSettings], GATES]

To add an entry: decorate a settings class with ``@GATES.register``, in a module that the configuration names under
``imports``. See docs/extending.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dist_moe.errors import shown

S = TypeVar("S", bound=BaseModel)

UNKNOWN_NAME = "unknown_name"
"""Type of the validation error for a name that nothing is registered under."""


class Registry(Generic[S]):
    """Settings classes derived from ``base``, by name.

    ``kind``: the noun by which messages call an entry. ``default``: the name of a section that gives none.
    """

    def __init__(self, kind: str, base: type[S], default: str | None = None) -> None:
        self.kind = kind
        self.base = base
        self.default = default
        self._entries: dict[str, type[S]] = {}

    def register(self, settings: type[S]) -> type[S]:
        """Make ``settings`` known by its literal name or names; usable as a class decorator.

        Raises ValueError if it has no literal name, or if one of them is taken.
        """
        names = names_of(settings)
        if not names:
            raise ValueError(f'{settings.__name__} must declare its name: name: Literal["..."] = "..."')
        for name in names:
            other = self._entries.get(name, settings)
            if (other.__module__, other.__qualname__) != (settings.__module__, settings.__qualname__):
                raise ValueError(f"the {self.kind} name {name!r} is taken by {other.__module__}.{other.__qualname__}")
        self._entries |= dict.fromkeys(names, settings)
        return settings

    def with_default(self, name: str) -> Registry[S]:
        """Return this registry, entries shared, for a field whose section is called ``name`` where it gives no name."""
        view = copy.copy(self)
        view.default = name
        return view

    @property
    def by_name(self) -> dict[str, type[S]]:
        """All registered classes by name, a copy."""
        return dict(self._entries)

    @property
    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    @property
    def classes(self) -> list[type[S]]:
        """All registered classes, each once, in the order of registration."""
        return list(dict.fromkeys(self._entries.values()))

    def get(self, name: object) -> type[S] | None:
        """Return the class registered under ``name``, None if there is none."""
        return self._entries.get(name) if isinstance(name, str) else None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._choose, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"oneOf": [handler(settings.__pydantic_core_schema__) for settings in self.classes]}

    def _choose(self, value: Any, _: Any) -> S:
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("dict_type", "Input should be a valid dictionary")
        name = value.get("name", self.default)
        settings = self.get(name)
        if settings is None:
            near = difflib.get_close_matches(shown(name)[1:-1], self.names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            allowed = f"{hint}allowed: {', '.join(self.names)}, and what modules under imports register"
            context = {"name": shown(name), "kind": self.kind, "allowed": allowed}
            raise PydanticCustomError(UNKNOWN_NAME, "name={name} is not a {kind}; {allowed}", context)
        return settings.model_validate({"name": name} | value)


def names_of(settings: type[BaseModel]) -> tuple[str, ...]:
    """Return the literal values that the field ``name`` of a section can have; none if it has no such field."""
    field = settings.model_fields.get("name")
    values = get_args(field.annotation) if field else ()
    return values if all(isinstance(value, str) for value in values) else ()
