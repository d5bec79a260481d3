"""Damage of every kind to real checkpoints is found and named, and the last good one is used."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dist_moe.engine.checkpoint import files as checkpoint_files
from tests.helpers.commands import REPOSITORY, succeed
from tests.helpers.runs import write_config

DAMAGES = 36


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "corrupt_checkpoints.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    config = write_config(root, tiny_data, train={"max_steps": 4, "checkpoint_every": 2})
    succeed(2, "train", "--run-dir", root / "run", config, "parallel.expert_parallel_size=2")
    return root / "run"


def test_damage_of_every_kind(tool: ModuleType, run: Path, tmp_path: Path) -> None:
    drawn, kinds = random.Random(1), set()
    for index in range(DAMAGES):
        damage, faults = tool.attempt(run, tmp_path / "copy", index, drawn)
        assert faults == [], damage
        kinds.add(damage.kind)
    assert len(kinds) == len(tool.KINDS)


def test_the_tool_sees_what_is_not_found(
    tool: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without digests, a file of an older checkpoint would not be."""

    def believed(path: Path) -> str:
        return checkpoint_files.read_manifest(path.parent).files[path.name]

    monkeypatch.setattr(checkpoint_files, "digest_of", believed)
    _, faults = tool.attempt(run, tmp_path / "copy", tool.KINDS.index(tool.older_file), random.Random(1))
    assert "not found" in faults
    assert "evaluation would have loaded it" in faults
