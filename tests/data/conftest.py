"""A tiny data set for the tests of the data floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tiny_movielens import write_tiny_movielens


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_movielens(tmp_path / "tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of real data."""
    return tmp_path_factory.mktemp("cache")
