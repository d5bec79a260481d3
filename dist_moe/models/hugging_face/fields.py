"""Fields of our own in config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from dist_moe.config.registry import UNKNOWN_NAME
from dist_moe.errors import UserError

MIXTURE = "mixture"
"""Fields of the model's section of our configuration that transformers' have no place for."""

CONTEXT = "gate_context"
"""``total_steps``: of the training run, which gates with a schedule need to know."""

IMPORTS = "imports"
"""Modules that register gates and experts of the user's own."""


@contextmanager
def followed() -> Iterator[None]:
    """Turn what pydantic says of a section within into a UserError."""
    try:
        yield
    except ValidationError as error:
        faults = []
        for each in error.errors():
            field = ".".join(map(str, each["loc"]))
            faults.append(f"{field}.{each['msg']}" if each["type"] == UNKNOWN_NAME else f"{field}: {each['msg']}")
        raise UserError(f"the Hugging Face configuration cannot be followed: {'; '.join(faults)}") from error
