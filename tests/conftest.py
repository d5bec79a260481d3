"""What all tests share: one thread, a tiny data set, no one's environment."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.texts import write_tiny_text


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "DIST_MOE_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``root`` of a tiny data set in GroupLens' layout, and a ``cache`` for what is prepared from it."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    return {
        "root": str(write_tiny_movielens(directory / "raw", users=120, items=90)),
        "cache": str(directory / "cache"),
    }


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``root`` of a tiny corpus of two domains, and a ``cache`` for what is prepared from it."""
    directory: Path = tmp_path_factory.mktemp("text")
    return {"root": str(write_tiny_text(directory / "raw")), "cache": str(directory / "cache")}


@pytest.fixture
def closed_port() -> int:
    """A local TCP port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
