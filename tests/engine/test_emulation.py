"""Ranks that this package starts itself: exit codes, and what is refused before any of them exists."""

from __future__ import annotations

import os
import signal

import pytest

from dist_moe.cli.main import main
from dist_moe.engine.launch import emulation
from dist_moe.engine.launch.emulation import as_first_of, run_ranks
from dist_moe.engine.launch.environment import LaunchEnvironment
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
