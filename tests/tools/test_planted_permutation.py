"""The study of planted permutations scrambles the table of a run that is there today, and finds its way back."""

from __future__ import annotations

from pathlib import Path

from dist_moe.engine.launch.environment import LaunchEnvironment
from tests.helpers.commands import succeed
from tests.helpers.runs import write_config
from tools.planted_permutation import measure


def test_a_trained_recommender_is_scrambled_and_searched(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = write_config(tmp_path, tiny_data, model={"gate": {"name": "top_k", "k": 2}})
    succeed(1, "train", config, "--run-dir", tmp_path / "run")
    assert LaunchEnvironment.read().world_size == 1
    measured = measure(tmp_path / "run", seed=1)
    assert measured["scrambled"] > measured["original"]
    assert measured["found"] <= measured["scrambled"]
    assert sorted(measured["table"]) == [0, 1, 2, 3]
    assert measured["local_optimum"]
