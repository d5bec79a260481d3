"""Errors that the user can fix: the command line prints their message and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, checkpoint or command line.

    The message names the field, the value and the remedy. The command line prints it
    without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training gave no finite loss or gradient any more, for too many steps in a row, the last of them ``step``."""

    exit_code = 3

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


def shown(value: object, limit: int = 80) -> str:
    """Return ``repr(value)`` for a message, cut to ``limit`` characters."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"  # Python refuses to write out thousands of them
    return text if len(text) <= limit else f"{text[:limit]}..."


class LaunchError(UserError):
    """A mistake in what the launcher gave to this process alone, such as its variables: told by each that has one."""
