"""A run directory: used once, nothing of a run is written over, and metrics.jsonl never tells a step twice."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.record_file import KEPT_BYTES
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


def with_step(step: int) -> str:
    return f'{{"step": {step}, "loss": 1.0}}\n'


BAD = {
    "garbage": b"\x00\xff\xfe garbage\n",
    "no step": b'{"loss": 3}\n',
    "a number": b"3\n",
    "a list": b"[1, 2]\n",
    "text": b'"step"\n',
    "null": b"null\n",
    "no UTF-8": b'{"step": 2, "a": "\xe4"}\n',
    "deep": b"[" * 200_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"\n",
    "step of text": b'{"step": "2"}\n',
    "step of a half": b'{"step": 2.5}\n',
    "step is true": b'{"step": true}\n',
    "step below 0": b'{"step": -1}\n',
    "a long number": b'{"step": ' + b"9" * 5000 + b"}\n",
    "no line": b"\n",
    "cut and gone on": b'{"step": 2, "lo{"step": 2}\n',
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("inserted", [True, False])
def test_a_line_that_is_no_record_is_moved_aside_and_counted(tmp_path: Path, name: str, inserted: bool) -> None:
    run = RunDirectory(tmp_path)
    lines = [with_step(step).encode() for step in range(1, 7)]
    lines[1:2] = [*lines[1:2], BAD[name]] if inserted else [BAD[name]]
    lines.append(b"among what is done again\n")
    run.metrics.write_bytes(b"".join(lines))
    assert run.last_step == 6
    assert run.forget_metrics_after(5) == 1
    assert metrics_of(run) == [1, *([2] if inserted else []), 3, 4, 5]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == BAD[name] + b"among what is done again\n"
    assert run.forget_metrics_after(5) == 0


def test_a_line_of_100_mb(tmp_path: Path) -> None:
    """It is never in memory as a whole."""
    run = RunDirectory(tmp_path)
    with run.metrics.open("wb") as file:
        file.write(with_step(1).encode() + b'{"step": 2, "load": [')
        for _ in range(100):
            file.write(b"0, " * 350_000)
        file.write(b"0]}\n" + with_step(3).encode())
    tracemalloc.start()
    assert run.forget_metrics_after(5) == 1
    assert tracemalloc.get_traced_memory()[1] < 4 * KEPT_BYTES
    tracemalloc.stop()
    assert metrics_of(run) == [1, 3]
    assert (tmp_path / "metrics.jsonl.bad").stat().st_size > 100e6


def test_words_that_are_no_json_become_null(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2, "loss": NaN, "load": [Infinity]}\n{"step": 3}\n')
    assert run.forget_metrics_after(2) == 0
    assert json.loads(run.metrics.read_text().splitlines()[1]) == {
        "not_finite": {"loss": "nan", "load": {"0": "inf"}},
        "step": 2,
        "loss": None,
        "load": [None],
    }


def test_what_only_loses_its_end_is_cut_and_not_written_anew(tmp_path: Path) -> None:
    """So that a run goes on where the disk is full."""
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(map(with_step, range(1, 9))))
    inode = run.metrics.stat().st_ino
    run.forget_metrics_after(5)
    assert (metrics_of(run), run.metrics.stat().st_ino) == ([1, 2, 3, 4, 5], inode)


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "metrics.jsonl", "metrics.jsonl.bad", "summary.json"]
)
@pytest.mark.parametrize("place", ["", "stages/one"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / place / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is no file.*move it away"):
        RunDirectory(tmp_path).check_kinds()


@pytest.mark.parametrize("name", ["heartbeats", "checkpoints", "best", "stages", "stages/one"])
@pytest.mark.parametrize("how", [Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_something_else_in_the_place_of_a_directory(tmp_path: Path, name: str, how: Callable[[Path], None]) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    how(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is no directory.*move it away"):
        RunDirectory(tmp_path).check_kinds()


def test_kinds_that_are_right(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "stages" / "one").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "run" / "metrics.jsonl").touch()
    RunDirectory(tmp_path / "run").check_kinds()
    RunDirectory(tmp_path / "nowhere").check_kinds()


@pytest.mark.parametrize(
    "name", ["summary.json", "metrics.jsonl", "checkpoints/step-00000001", "best/x", "stages/a/config.yaml"]
)
def test_what_is_left_of_a_run_without_its_configuration_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("something")
    with pytest.raises(UserError, match="nothing is written over it"):
        RunDirectory(tmp_path).check_unused()


def test_what_a_start_that_failed_leaves_is_in_nobody_s_way(tmp_path: Path) -> None:
    for directory in ("heartbeats/abc", "checkpoints", "stages/a/heartbeats"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "events.out.tfevents.1.host.2.0").write_text("header")
    RunDirectory(tmp_path).check_unused()
    assert not RunDirectory(tmp_path).has_progress
