"""Fields of our own in config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from dist_moe.errors import UserError

MIXTURE = "mixture"
"""Of the model's section of our configuration, those that transformers' have no place for."""

CONTEXT = "gate_context"
"""``total_steps``: of the training run, which gates with a schedule need to know."""

IMPORTS = "imports"
"""Modules that register gates of the user's own."""


@contextmanager
def followed() -> Iterator[None]:
    """Turns what pydantic says of a section within into a UserError."""
    try:
        yield
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"the Hugging Face configuration cannot be followed: {faults}") from error
