"""`dist-moe evaluate` gives the metrics of summary.json again, from the checkpoint, at any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.recipes.recipe import plan_resumed_run
from dist_moe.tasks import build_model
from dist_moe.tasks.ranking_metrics import area_under_curve
from tests.helpers.commands import succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import write_config

TEST_METRICS = {
    *("auc", "bce", "mse", "loss", "active_experts", "active_experts_by_gate"),
    *(f"{kind}_experts{by}" for kind in ("effective", "dead") for by in ("", "_by_layer")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Two ranks, dropout while training, stopped within the permutation stage: the table counts, not the matrix."""
    root = tmp_path_factory.mktemp("evaluate")
    config = write_config(
        root,
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}, "permutation": {"epochs": 1}},
        train={"max_steps": 40},
    )
    succeed(2, "train", "--run-dir", root / "run", config, "parallel.expert_parallel_size=2")
    return root / "run"


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def test_what_a_summary_holds(summary: dict[str, Any]) -> None:
    assert summary["test"].keys() >= TEST_METRICS
    assert isinstance(summary["test"]["dead_experts"], int)
    assert summary["baselines"].keys() == {"constant", "popularity"}
    for metrics in summary["baselines"].values():
        assert metrics.keys() >= {"auc", "bce", "mse", "loss"}
    assert summary["baselines"]["constant"]["auc"] == 0.5
    assert summary["baselines"]["popularity"]["auc"] > 0.55
    assert summary["baselines"]["popularity"]["bce"] < summary["baselines"]["constant"]["bce"]
    assert (summary["steps"], summary["first_step"]) == (40, 0)
    assert summary["data"]["counts"]["test"] > 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_metrics_again(run: Path, summary: dict[str, Any], world_size: int) -> None:
    first, *others = succeed(world_size, "evaluate", run, "--json")
    again = json.loads(first.out)
    assert again["checkpoint"] == "step-00000040"
    assert again["test"].keys() == summary["test"].keys()
    for name in TEST_METRICS:
        assert again["test"][name] == pytest.approx(summary["test"][name], abs=1e-6), name
    assert again["baselines"] == summary["baselines"]
    assert [outcome.out for outcome in others] == [""] * (world_size - 1)


def test_the_table_for_people(run: Path, summary: dict[str, Any]) -> None:
    (outcome,) = succeed(1, "evaluate", run)
    assert "step-00000040" in outcome.out
    for metric in ("auc", "bce", "mse", "loss"):
        assert f"{summary['test'][metric]:.4f}" in outcome.out


def test_evaluating_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    succeed(1, "evaluate", run, "--json")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def metrics_by_hand(run: Path) -> dict[str, float | list[float]]:
    """The test pairs one by one through the model in evaluation mode, on one rank."""
    plan = plan_resumed_run(run, ["parallel.expert_parallel_size=1"])
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model = build_model(plan.config, plan.task, groups.world).eval()
        place_weights(model, read_model(newest_checkpoint(run)))
        model.begin_evaluation()
        test = plan.task.test
        probabilities, squares, entropies = [], [], []
        experts = torch.zeros(model.moe.experts.num_experts)
        active = [0, 0]
        for index in range(len(test)):
            pair = test.batch(np.array([index]), np.array([index]))
            with torch.no_grad():
                output = model(pair.user_B, pair.item_B)
            logit_B, stars_B = output.predictions
            probability = float(logit_B.double().sigmoid())
            watched = float(pair.rating_B) > 0
            probabilities.append(probability)
            entropies.append(-np.log(probability if watched else 1 - probability))
            if watched:
                squares.append(float(stars_B - pair.rating_B) ** 2)
            for gate, route in enumerate(output.layers[0].routes):
                active[gate] += route.num_assignments
                experts[route.slot_N] += 1
    watched_N = np.asarray(test.rating_N) > 0
    return {
        "auc": area_under_curve(np.array(probabilities), watched_N),
        "bce": float(np.mean(entropies)),
        "mse": float(np.mean(squares)),
        "active_experts": sum(active) / (2 * len(test)),
        "active_experts_by_gate": [count / len(test) for count in active],
        "dead_experts": int((experts == 0).sum()),
        "effective_experts": float(np.exp(-sum(s * np.log(s) for s in (experts / experts.sum()).tolist() if s))),
    }


def test_metrics_by_hand(run: Path, summary: dict[str, Any]) -> None:
    (by_hand,) = on_ranks(1, metrics_by_hand, run)
    for name, value in by_hand.items():
        assert summary["test"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
