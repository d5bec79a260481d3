"""dist-moe plan, where it speaks of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run_here
from tests.planning.scale.machines import PLAIN


def test_a_row_for_every_size_and_exchange(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sizes.png"
    asked = ["plan", str(config), "--nodes", "8", "--gpus", "2", "--sweep", "--png", str(picture)]
    done = run_here([*asked, "parallel.expert_parallel_size=4"])
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if " x 2 " in line]
    assert [(row[0], row[4]) for row in rows] == [(n, e) for n in "1248" for e in ("flat", "two_level")]
    assert [int(row[3]) for row in rows[::2]] == [2, 4, 4, 4]
    assert "not measured" in done.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_machine_of_ones_own_and_one_exchange(config: Path, tmp_path: Path) -> None:
    PLAIN.write(tmp_path / "plain.yaml")
    asked = ["plan", str(config), "--nodes", "2", "--gpus", "2", "--machine", str(tmp_path / "plain.yaml"), "--json"]
    (size,) = json.loads(run_here([*asked, "--two-level", "parallel.expert_parallel_size=4"]).out)
    (prediction,) = size["predictions"]
    assert prediction["exchange"] == "two_level"
    assert prediction["seconds"]["wire"] > 0
    (larger,) = json.loads(run_here([*asked, "--tokens-per-rank", "64"]).out)
    assert (size["batch_size"], larger["batch_size"]) == (64, 256)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--nodes", "3", "--gpus", "2", "parallel.expert_parallel_size=4"],
            ["expert_parallel_size=4", "3 x 2", "choose"],
        ),
        (["--nodes", "0"], ["--nodes=0", "at least 1"]),
        (["--gpus", "2"], ["--gpus", "needs --nodes"]),
        (["--nodes", "2", "--ranks", "2"], ["--ranks", "leave out"]),
        (["--nodes", "2", "--machine", "cray"], ["--machine=cray", "h100"]),
        (["--nodes", "2", "--experts-per-token", "5"], ["--experts-per-token=5", "model.num_experts=4"]),
        (["--nodes", "2", "--skew", "0.5"], ["--skew=0.5", "1..1"]),
        (["--nodes", "3"], ["train.batch_size=64", "3"]),
    ],
)
def test_mistakes_are_named(config: Path, arguments: list[str], words: list[str]) -> None:
    done = run_here(["plan", str(config), *arguments])
    assert done.code == 2
    for word in words:
        assert word in done.err
    without = run_here(["plan", "--nodes", "2"])
    assert without.code == 2
    assert "CONFIG: required" in without.err
