"""Ranks that this package starts itself: exit codes, and what is refused before any of them exists."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dist_moe.cli.main import main
from dist_moe.engine.launch import emulation
from dist_moe.engine.launch.emulation import as_first_of, run_ranks
from dist_moe.engine.launch.environment import LaunchEnvironment, typed_command
from dist_moe.engine.launch.signals import STOP_SIGNALS


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["no-such-command"], 2)])
def test_the_exit_code_of_the_ranks_is_passed_on(arguments: list[str], code: int) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert run_ranks(3, arguments) == code
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_run_is_checked_as_its_first_rank_would_see_it() -> None:
    before = dict(os.environ)
    with as_first_of(4):
        assert LaunchEnvironment.read() == LaunchEnvironment(0, 4, 0, launched=True, local_world_size=4)
    assert dict(os.environ) == before


def test_a_rank_knows_the_command_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python is called as ranks are, and says what they would write into their run."""
    program = tmp_path / "python"
    lines = [
        f"#!{sys.executable}",
        "import os, pathlib, shlex, sys",
        "assert sys.argv[1:3] == ['-m', 'dist_moe']",
        "sys.argv[:3] = ['/somewhere/dist_moe/__main__.py']",
        "from dist_moe.engine.launch.environment import typed_command",
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(shlex.join(typed_command()))",
    ]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert run_ranks(2, ["train", "c.yaml", "model.gate={name: hash}"]) == 0
    typed = "dist-moe train --emulate 2 c.yaml 'model.gate={name: hash}'"
    assert [(tmp_path / rank).read_text() for rank in "01"] == [typed, typed]


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["/venv/bin/dist-moe", "train", "c.yaml"], ["dist-moe", "train", "c.yaml"]),
        (["/src/dist_moe/__main__.py", "train", "c.yaml"], ["dist-moe", "train", "c.yaml"]),
        (["examples/mine.py"], ["examples/mine.py"]),
    ],
)
def test_the_command_is_named_as_it_is_typed(
    words: list[str], typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert typed_command() == typed


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The ranks that would have been started."""
    calls: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(emulation, "run_ranks", lambda *of: calls.append(of) or 7)
    monkeypatch.setattr("dist_moe.recipes.recipe.plan_new_run", lambda *_: LaunchEnvironment.read())
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        "train --emulate 3 c.yaml --run-dir here seed=1",
        "train c.yaml --emulate=3 --run-dir here seed=1",
        "train c.yaml --run-dir here seed=1 --emul 3",
    ],
)
def test_the_ranks_get_all_other_arguments(started: list[tuple[int, list[str]]], arguments: str) -> None:
    assert main(arguments.split()) == 7
    assert started == [(3, ["train", "c.yaml", "--run-dir", "here", "seed=1"])]


@pytest.mark.parametrize(
    ("ranks", "launcher", "reason"),
    [
        ("0", {}, "--emulate 0: at least 1 rank is needed"),
        ("2", {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "rank 1 of 4 that a launcher started"),
    ],
)
def test_what_cannot_be_emulated(
    started: list[tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ranks: str,
    launcher: dict[str, str],
    reason: str,
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "c.yaml", "--emulate", ranks]) == 2
    assert reason in capsys.readouterr().err
    assert started == []
