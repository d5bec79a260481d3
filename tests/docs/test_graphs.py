"""The page on graphs, followed word for word: from a saved ``Data`` to an evaluated model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.data.graphs.tiny_graphs import tiny_graph, write_pyg
from tests.helpers.commands import REPOSITORY, example_of, run_here

PAGE = (REPOSITORY / "docs/graphs.md").read_text()


def test_the_layer_takes_any_two_modules() -> None:
    names: dict[str, Any] = {}
    exec(example_of(REPOSITORY / "docs/graphs.md"), names)
    assert names["needs_the_strong_one"].shape == (64,)
    assert all(parameter.grad is not None for parameter in names["layer"].parameters())


def test_from_a_saved_graph_to_an_evaluated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    write_pyg(tmp_path / "graph.pt", tiny_graph(nodes=240, edges=600))
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(text.splitlines()) <= 10
    (tmp_path / "mine.yaml").write_text(text)
    (commands,) = re.findall(r"^```\n(dist-moe train mine.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    train, evaluate = (shlex.split(line)[1:] for line in commands.splitlines())
    trained = run_here([*train, "train.epochs=20", "recipe.max_sessions=1"])
    assert trained.code == 0, trained.err
    evaluated = run_here([*evaluate, "--json"])
    assert evaluated.code == 0, evaluated.err
    test = json.loads(evaluated.out)["test"]
    assert test["accuracy"] > 1 / 3
    assert 0 <= test["strong_share"] <= 1
