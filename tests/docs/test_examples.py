"""examples/ as its readers run it."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.data.tables.tiny_named import write_tiny_census
from tests.helpers.commands import REPOSITORY, finish, start
from tests.helpers.pool import on_ranks

LINES_ALLOWED = 25
DDP = REPOSITORY / "examples/ddp.py"


def test_fit_twice() -> None:
    example = REPOSITORY / "examples/fit_twice.py"
    code = [line for line in example.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) <= LINES_ALLOWED
    outcome = finish(start(sys.executable, example))
    assert outcome.code == 0, outcome.err
    first, second = map(float, re.findall(r"learning rate \S+: loss (\S+)", outcome.out))
    assert second < first < 0.1


def test_early_exit_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP learns; nobody asks it, all do, or those whom a threshold on the validation rows tells to."""
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    root = write_tiny_census(tmp_path / "census", train=800, test=400)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(REPOSITORY / "examples/early_exit.py"))["main"](root)
    found = re.findall(r"^(.{20}) accuracy (\S+), +(\S+)% ask the MLP, +\S+ microseconds", out.getvalue(), re.MULTILINE)
    accuracy = {name.strip(): float(value) for name, value, _ in found}
    share = {name.strip(): float(value) for name, _, value in found}
    assert (share["logistic regression"], share["MLP"]) == (0.0, 100.0)
    assert share["within .1 % of it"] <= share["best on validation"]
    majority = (root / "census-income.test").read_text().count("- 50000.") / 400
    assert accuracy["MLP"] > majority + 0.05


def printed_by(example: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(example)
    return out.getvalue()


def test_ddp_prints_the_same_norms_on_two_ranks_as_on_one() -> None:
    (alone,) = on_ranks(1, printed_by, str(DDP))
    norms = [float(norm) for norm in re.findall(r"norm (\S+)", alone)]
    assert len(norms) == 5
    assert all(0.05 < norm < 10 for norm in norms)  # each is clipped
    for rank, printed in enumerate(on_ranks(2, printed_by, str(DDP))):
        found = re.findall(rf"rank {rank} of 2, step \d: gradient norm (\S+)", printed)
        assert max(abs(float(a) - b) for a, b in zip(found, norms, strict=True)) <= 2e-6


def test_ddp_ends_every_time() -> None:
    """One run in ten used to wait for ever when it was let go of."""
    assert all(len(on_ranks(2, printed_by, str(DDP))) == 2 for _ in range(20))


def test_a_page_shows_the_example_in_twenty_lines() -> None:
    lines = DDP.read_text().split("\n\n", 1)[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 20
    assert "\n".join(lines) in (REPOSITORY / "docs/library.md").read_text()
