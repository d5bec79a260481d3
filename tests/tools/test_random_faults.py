"""A rank killed while it saves, searches or moves experts: the run ends as if nothing had been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.commands import finish, start


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "search", "migration"])
def test_a_kill_at_a_chosen_moment(tmp_path: Path, kind: str) -> None:
    command = ["tools/random_faults.py", "--runs", 1, "--kills", 1, "--steps", 40, "--kinds", kind]
    outcome = finish(start(sys.executable, *command, "--output", tmp_path / "result.md"))
    assert outcome.code == 0, outcome.out + outcome.err
    assert "run-0: " in outcome.out
    assert f"{{'{kind}': 1}}" in outcome.out
    assert "1 of 1 equal the undisturbed run" in (tmp_path / "result.md").read_text()
