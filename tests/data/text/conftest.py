"""A tiny corpus on disk, and what is prepared from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_moe.data.text import Text, TextConfig, prepare_text

from .tiny_text import write_tiny_text

SMALL: dict[str, Any] = {"vocab_size": 320, "sequence_length": 16, "held_out": 0.2}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text(tmp_path_factory.mktemp("text") / "root")


@pytest.fixture(scope="session")
def text(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    config = TextConfig(root=root, cache=tmp_path_factory.mktemp("cache"), **SMALL)
    return prepare_text(config, progress=False)
