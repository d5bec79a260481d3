"""examples/ as its readers run it."""

from __future__ import annotations

import re
import sys

from tests.helpers.commands import REPOSITORY, finish, start

LINES_ALLOWED = 25


def test_fit_twice() -> None:
    example = REPOSITORY / "examples/fit_twice.py"
    code = [line for line in example.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) <= LINES_ALLOWED
    outcome = finish(start(sys.executable, example))
    assert outcome.code == 0, outcome.err
    first, second = map(float, re.findall(r"learning rate \S+: loss (\S+)", outcome.out))
    assert second < first < 0.1
