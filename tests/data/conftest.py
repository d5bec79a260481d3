"""Tests of the data floor see no data root and no cache of the person who runs them, and no network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny_movielens import write_tiny_movielens


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_MOE_DATA_ROOT", raising=False)
    monkeypatch.delenv("DIST_MOE_CACHE", raising=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_movielens(tmp_path / "tiny")


@pytest.fixture
def closed_port() -> int:
    """A local TCP port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def pip_sees_only(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> Callable[[Path | None], None]:
    """Call it with a folder of wheels that pip shall find, or with None for an index out of reach."""

    def set_environment(wheels: Path | None) -> None:
        for variable in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_RETRIES", "0")
        if wheels is None:
            monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
        else:
            monkeypatch.setenv("PIP_NO_INDEX", "1")
            monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    return set_environment
