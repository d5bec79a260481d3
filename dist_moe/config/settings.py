"""The base of every section of the configuration: immutable, no unknown fields, no inf or nan, no other types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema

LARGEST_INTEGER = 2**53 - 1
"""Beyond it a float, and with it every reader of JSON, skips whole numbers."""

LARGEST_FLOAT = 3.4e38
"""Beyond it is infinity in fp32, in which models compute."""

LARGEST_COUNT = 2**16
"""Experts, slots and null slots: more than have been trained, and each takes time to be made."""

LARGEST_SIZE = 2**20
"""Widths and lengths: a tensor with three of them still has less than 2^63 elements."""

LARGEST_DEPTH = 1000
"""Layers of a model: each takes time to be built."""

LARGEST_STEP = 99_999_999
"""Steps of a run; checkpoints are named by eight digits."""

LARGEST_EPOCHS = 1e6
"""Passes over the data."""

Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
"""A width of some part of a model."""

_PATH_BYTES, _NAME_BYTES = 4095, 255
"""Lengths of a path and of a name in it that Linux takes."""


def _make_exact(schema: Any) -> None:
    """Make numbers, truth values and texts of a schema strict, and bound its numbers, wherever in it they are."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if kind in ("int", "float", "bool", "str"):
            schema["strict"] = True
        if kind in ("int", "float"):
            largest = LARGEST_INTEGER if kind == "int" else LARGEST_FLOAT
            for here, other, bound in (("le", "lt", largest), ("ge", "gt", -largest)):
                if other not in schema:
                    schema.setdefault(here, bound)
        for key, part in schema.items():
            if key not in ("default", "metadata", "serialization"):
                _make_exact(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _make_exact(part)


class Settings(BaseModel):
    """A section of the configuration, declared beside the class that it configures.

    A value is taken as YAML gives it: ``"1"``, ``true`` and ``1.0`` are no whole numbers, ``1`` is no truth value; a
    whole number may stand for a fraction. Where a field gives no narrower bounds, whole numbers are within 2^53 and
    fractions within what fp32 holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Not strict=True: lists must do for tuples, texts for paths and mappings for sections, as YAML has no others.
        schema = handler(source)
        _make_exact(schema)
        return schema

    @field_validator("*")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        """Refuse paths that no system call takes."""
        if isinstance(value, Path):
            parts = [len(os.fsencode(part)) for part in value.parts]
            if "\0" in str(value) or len(os.fsencode(value)) > _PATH_BYTES or max(parts, default=0) > _NAME_BYTES:
                raise ValueError(
                    f"cannot be a path: a name has at most {_NAME_BYTES} bytes, a path {_PATH_BYTES}, none of them NUL"
                )
        return value
