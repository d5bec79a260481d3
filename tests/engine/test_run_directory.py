"""A run directory: used once, and metrics.jsonl never tells a step twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError


def metrics_of(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [1, 2]),
        ('{"step": 1}\n{"step": 2}\n{"st', [1, 2]),
        ('{"step": 1}\n{"st', [1]),
        ("", []),
    ],
)
def test_records_after_the_checkpoint_are_dropped(tmp_path: Path, content: str, kept: list[int]) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text(content)
    run.forget_metrics_after(2)
    assert metrics_of(run) == kept


def test_there_may_be_no_metrics_yet(tmp_path: Path) -> None:
    RunDirectory(tmp_path).forget_metrics_after(2)
    assert not RunDirectory(tmp_path).metrics.exists()


def test_what_it_says_about_itself(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep" / "run")
    run.check_unused()
    with pytest.raises(UserError, match=r"config\.yaml"):
        run.check_exists()
    run.create()
    run.describe({"seed": 3}, LaunchEnvironment())
    run.check_exists()
    with pytest.raises(UserError, match="--resume"):
        run.check_unused()
    environment = json.loads(run.environment.read_text())
    assert environment["world_size"] == 1
    assert {"torch", "deepspeed"} <= environment["packages"].keys()


def test_a_place_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--run-dir"):
        RunDirectory(tmp_path / "file" / "run").create()
