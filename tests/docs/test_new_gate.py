"""The example of docs/new_gate.md, as its reader would use it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY, Outcome, finish, start
from tests.helpers.runs import write_config

DIST_MOE = (sys.executable, "-m", "dist_moe")
GATE = "model.gate={name: cosine, k: 2}"


@pytest.fixture
def directory(tmp_path: Path, tiny_data: dict[str, str]) -> Path:
    """A directory with the example saved under the name that the page gives it."""
    page = (REPOSITORY / "docs/new_gate.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 30
    (tmp_path / "cosine_gate.py").write_text(example)
    write_config(tmp_path, tiny_data, model={"permutation": {"epochs": 0.2}})
    return tmp_path


def dist_moe(directory: Path, *arguments: str) -> Outcome:
    return finish(start(*DIST_MOE, *arguments, cwd=directory))


def test_the_example_trains_with_local_search(directory: Path) -> None:
    outcome = dist_moe(directory, "train", "config.yaml", "--run-dir", "run", "imports=[cosine_gate]", GATE)
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["active_experts"] == 2
    assert "cosine+" in outcome.err
    again = dist_moe(directory, "evaluate", "run", "--json")
    assert again.code == 0, again.err


def test_its_mistakes_are_explained(directory: Path) -> None:
    outcome = dist_moe(directory, "config", "config.yaml", GATE)
    assert outcome.code == 2
    assert "'cosine' is not a gate; allowed: " in outcome.err
    wrong = "model.gate={name: cosine, temperature: 0}"
    outcome = dist_moe(directory, "config", "config.yaml", "imports=[cosine_gate]", wrong)
    assert outcome.code == 2
    assert "model.gate.temperature=0: input should be greater than 0" in outcome.err
    outcome = dist_moe(directory, "config", "config.yaml", "imports=[cosine_gatte]")
    assert outcome.code == 2
    assert "imports: the module 'cosine_gatte' cannot be imported" in outcome.err
