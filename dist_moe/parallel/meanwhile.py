"""What a rank computes while rows travel."""

from __future__ import annotations

from collections.abc import Callable

Meanwhile = Callable[[], None]


def nothing() -> None:
    """To do meanwhile."""
