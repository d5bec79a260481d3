"""Errors that the user can fix: the command line prints their message and exits with code 2."""

from __future__ import annotations

from typing import Any

_SHOWN = 40
_MOST_DIGITS = 64


def shown(value: Any) -> str:
    """Return a value as a message quotes it: texts in quotes, and cut where it is long."""
    if isinstance(value, int) and value.bit_length() > _MOST_DIGITS:
        return "a number of very many digits"  # Python refuses to write out thousands of them
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, checkpoint or command line.

    The message names the field, the value and the remedy. The command line prints it
    without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training gave no finite loss or gradient any more, for too many steps in a row."""

    exit_code = 3
