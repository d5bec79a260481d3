"""Gates by name: what ``gate: {name: ...}`` in a configuration can mean.

To add a gate: write its file, and register its settings, here or in a module of your own that the
configuration names under ``imports``. See docs/new_gate.md.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from dist_moe.gates.base import GateSettings

DEFAULT_GATE = "comet"

_GATES: dict[str, type[GateSettings]] = {}


def register_gate(settings: type[GateSettings]) -> type[GateSettings]:
    """Make ``gate: {name: NAME}`` mean these settings; usable as a class decorator.

    Raises ValueError if the settings have no literal name or if it is another gate's already.
    """
    name = settings.model_fields["name"].default
    if not isinstance(name, str):
        raise ValueError(f'{settings.__name__} must declare its name: name: Literal["..."] = "..."')
    other = _GATES.setdefault(name, settings)
    if (other.__module__, other.__qualname__) != (settings.__module__, settings.__qualname__):
        raise ValueError(f"the gate name {name!r} is taken by {other.__module__}.{other.__qualname__}")
    _GATES[name] = settings
    return settings


def gate_settings() -> dict[str, type[GateSettings]]:
    """All registered settings by name."""
    return dict(_GATES)


class _ByName:
    """Validates a mapping by the settings that its ``name`` is registered for."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(_choose, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"oneOf": [settings.model_json_schema() for settings in _GATES.values()]}


def _choose(value: Any, _: Any) -> GateSettings:
    if isinstance(value, GateSettings):
        return value
    name = value.get("name", DEFAULT_GATE) if isinstance(value, dict) else value
    settings = _GATES.get(name) if isinstance(name, str) else None
    if settings is None:
        known = ", ".join(sorted(_GATES))
        raise ValueError(f"gate.name={name!r} is not a gate; allowed: {known}, and what modules under imports register")
    return settings.model_validate(value if isinstance(value, dict) else {"name": name})


GateConfig = Annotated[SerializeAsAny[GateSettings], _ByName()]
"""The type of a configuration field that holds any registered gate."""
