"""The comparison of predicted and real steps runs, and finds bytes and times of the right size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.commands import finish, start


@pytest.mark.slow
def test_a_short_comparison_on_one_and_two_ranks(tmp_path: Path) -> None:
    report = tmp_path / "result.md"
    sizes = ["--tokens", 512, "--width", 64, "--rounds", 1, "--places", 0, 1]
    outcome = finish(start(sys.executable, "-m", "tools.validate_plan", *sizes, "--report", report))
    assert outcome.code == 0, outcome.out + outcome.err
    rows = [line.split("|")[1:-1] for line in report.read_text().splitlines() if line.startswith("| 1 x")]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        (place, step) for place in ("1 x 1", "1 x 2") for step in ("layer", "training step")
    ]
    for row in rows:
        assert 0.1 < float(row[3]) < 10
        assert float(row[6]) == pytest.approx(1, abs=0.1)
