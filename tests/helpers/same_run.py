"""Whether two runs ended alike, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.board import read_board, steps_of
from tests.helpers.runs import tensors_of


def assert_same_end(run: Path, reference: Path, steps: int) -> None:
    """Every step is on the board once; tensors of the newest checkpoint and test metrics are equal."""
    assert steps_of(read_board(run), "loss/task") == list(range(1, steps + 1))
    ours, theirs = tensors_of(run), tensors_of(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    tests = [json.loads((path / "summary.json").read_text())["test"] for path in (run, reference)]
    assert tests[0] == tests[1]
