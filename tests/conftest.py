"""What all tests share: one thread, a tiny data set, no one's environment."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

# A shell ignores SIGINT for what it starts in the background, and what is ignored stays so for all that starts here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported stays: the collections that every run asks for, and Python's own, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch  # here and below, not above: xdist's controller, for which everybody waits, needs none of it

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    for name in (*launcher, "DIST_MOE_DATA_ROOT", "DIST_MOE_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``root`` of a tiny data set in GroupLens' layout, and a ``cache`` for what is prepared from it."""
    from tests.data.tiny_movielens import write_tiny_movielens

    directory: Path = tmp_path_factory.mktemp("tiny")
    return {
        "root": str(write_tiny_movielens(directory / "raw", users=120, items=90)),
        "cache": str(directory / "cache"),
    }


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``root`` of a tiny corpus of two domains, and a ``cache`` for what is prepared from it."""
    from tests.helpers.texts import write_tiny_text

    directory: Path = tmp_path_factory.mktemp("text")
    return {"root": str(write_tiny_text(directory / "raw")), "cache": str(directory / "cache")}


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
