"""Tests of the data floor see no data root and no cache of the person who runs them, and no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.data.movielens import sources as movielens_sources

from .checks import change_archives, only_source
from .tiny_movielens import write_tiny_movielens


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_MOE_DATA_ROOT", raising=False)
    monkeypatch.delenv("DIST_MOE_CACHE", raising=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_movielens(tmp_path / "tiny")


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


@pytest.fixture
def grouplens_out_of_reach(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}/ml-1m.zip"
    sources = only_source(f"GroupLens ({url})", url)
    change_archives(monkeypatch, movielens_sources.EDITIONS, "movielens-1m", 0, sources=sources)
