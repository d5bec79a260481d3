"""Odd input is refused with a sentence or read rightly; and the fuzzer finds readers that do neither."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from dist_moe.errors import UserError
from tools.fuzz import fuzz, main, prepared, table
from tools.fuzzing.areas import AREAS
from tools.fuzzing.case import Area, Case, attempt

SEED = 16
SHORT = {"data": 120, "hugging_face": 120, "yaml": 120, "overrides": 120, "fields": 120}
"""Cases that the suite tries of each area."""

PLANTED = (
    *("right", "refused", "ValueError", "clips", "deletes", "touches", "says nothing", "refuses what is right"),
    *("accepts what is wrong", "a reading of its own fails", "dies", "hangs", "right again"),
)


class Planted(Area):
    """Readers of a file with one number, each with a fault but some; the number of the case says which."""

    name = "planted"

    def prepare(self) -> None:
        """Nothing is made."""

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Return the next reader: cases come in order, each once."""
        order = self.base / "order"
        tried = len(order.read_text()) if order.exists() else 0
        fault = PLANTED[tried]
        order.write_text("x" * (tried + 1))
        number = drawn.randrange(100, 10_000)
        (user / "number").write_text(str(number))

        def check(found: int) -> str | None:
            naive = int((user / "number").read_text())
            if fault == "a reading of its own fails":
                raise IndexError(fault)
            return None if naive == found else f"{naive} is read as {found}"

        must: Any = {"refuses what is right": "accept", "accepts what is wrong": "refuse"}.get(fault)
        return Case(fault, lambda: planted_reader(user / "number", fault), check, must)


def planted_reader(path: Path, fault: str) -> int:
    number = int(path.read_text())
    if fault in ("refused", "refuses what is right"):
        raise UserError(f"{path}: {number} is refused. Remedy: none")
    if fault == "says nothing":
        raise UserError("")
    if fault == "ValueError":
        raise ValueError(number)
    if fault == "clips":
        return min(number, 99)
    if fault == "deletes":
        path.unlink()
    if fault == "touches":
        os.utime(path, ns=(0, 0))
    if fault == "dies":
        os._exit(3)
    if fault == "hangs":
        time.sleep(600)
    return number


def test_planted_faults_are_found_and_told_apart(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    # A hanging reader has a second try, which is the next one of these: it is right.
    tallies = fuzz([Planted(base)], SEED, tmp_path / "place", minutes=8, cases=len(PLANTED) - 1, limit_s=4.0)
    tally = tallies["planted"]
    found = {outcome.what: outcome.verdict for _, outcome in tally.faults}
    assert found == {
        "ValueError": "traceback",
        "clips": "wrong",
        "deletes": "touched",
        "touches": "touched",
        "says nothing": "traceback",
        "refuses what is right": "wrong",
        "accepts what is wrong": "wrong",
        "a reading of its own fails": "wrong",
        "case 10": "traceback",  # it died, and cannot say what it was
    }
    assert (tally.counts["accepted"], tally.counts["refused"]) == (2, 1)


def test_what_hangs_twice_is_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "order").write_text("x" * PLANTED.index("hangs"))
    tallies = fuzz([Hanging(base)], SEED, tmp_path / "scratch", minutes=8, cases=1, limit_s=0.5)
    assert tallies["planted"].counts == {"hang": 1}
    assert "| planted | 1 | 0 | 0 | 0 | 1 | 0 | 0 |" in table(tallies)


class Hanging(Planted):
    """Readers that all hang."""

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Return one that hangs."""
        return Case("hangs", lambda: time.sleep(600))


def test_a_case_depends_on_seed_area_and_number_alone(tmp_path: Path) -> None:
    (area,) = prepared(["data"], tmp_path)
    numbers = range(3, 9)
    first = [attempt(area, SEED, number, tmp_path / "place") for number in numbers]
    again = [attempt(area, SEED, number, tmp_path / "place") for number in reversed(numbers)]
    assert first == again[::-1]
    assert len({outcome.what for outcome in first}) > 3


@pytest.mark.parametrize("area", SHORT)
def test_some_cases(tmp_path: Path, area: str) -> None:
    tallies = fuzz(prepared([area], tmp_path), SEED, tmp_path / "scratch", minutes=8, cases=SHORT[area])
    assert [(number, outcome) for number, outcome in tallies[area].faults] == []
    counts = tallies[area].counts
    assert counts.total() == SHORT[area]
    assert min(counts["refused"], counts["accepted"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
@pytest.mark.timeout(1200)
def test_many_cases(area: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--minutes", "5", "--seed", "1", "--areas", area])
    assert code == 0, capsys.readouterr().out
