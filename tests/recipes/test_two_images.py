"""The two-image task, through the command line: equal on one and two ranks, and metrics that a loop gives."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.gates.hash_routing import HashRouting, balanced_assignment
from dist_moe.models import TwoImageClassifier
from dist_moe.models.two_image_classifier import NUM_IDS, pixel_ids
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config, plan_resumed_run
from dist_moe.tasks import build_model
from tests.data.tiny_images import write_tiny_images
from tests.helpers.commands import succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, summary_of

STEPS, BATCH, WEIGHTS = 6, 16, (0.25, 0.5)
METRICS = {"accuracy", "accuracy_top_left", "accuracy_bottom_right", "ce_top_left", "ce_bottom_right", "loss"}
Metrics = dict[str, float]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    content: dict[str, Any] = {
        "data": {
            "name": "multi-mnist",
            "root": str(write_tiny_images(root / "raw", train=42, test=9)),
            "cache": str(root / "cache"),
        },
        "model": {
            "num_experts": 4,
            "experts": {"channels": [2, 3], "units": [6, 5]},
            "head_units": [7],
            "gate": {"name": "comet", "k": 2, "gamma": 0.3, "entropy_weight": 0.05},
            "permutation": {"epochs": 1.0},
        },
        "target_weights": list(WEIGHTS),
        "train": {"max_steps": STEPS, "epochs": 9, "batch_size": BATCH, "validate_every": 3},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[int, Path]:
    """By number of ranks, as many as expert-parallel ones."""
    by_world = {world: config.parent / f"run-{world}" for world in (1, 2)}
    for world, run in by_world.items():
        succeed(world, "train", "--run-dir", run, config, f"parallel.expert_parallel_size={world}")
    return by_world


def test_two_ranks_train_as_one(runs: dict[int, Path]) -> None:
    assert len(losses_of(runs[1])) == STEPS
    torch.testing.assert_close(losses_of(runs[2]), losses_of(runs[1]), rtol=0, atol=1e-5)
    for ours, theirs in zip(records_of(runs[2]), records_of(runs[1]), strict=True):
        assert ours["load"] == theirs["load"]
        weighted = WEIGHTS[0] * ours["ce_top_left"] + WEIGHTS[1] * ours["ce_bottom_right"]
        assert ours["loss"] == pytest.approx(weighted, rel=1e-6)
        assert ours["total_loss"] == pytest.approx(weighted + ours["entropy"] + ours["permutation"], rel=1e-6)
    tests = [summary_of(run)["test"] for run in runs.values()]
    for name in METRICS:
        assert tests[0][name] == pytest.approx(tests[1][name], abs=1e-5), name


@pytest.mark.parametrize("world", [1, 2])
def test_evaluate_gives_the_same_metrics_again(runs: dict[int, Path], world: int) -> None:
    again = json.loads(succeed(world, "evaluate", runs[2], "--json")[0].out)
    summary = summary_of(runs[2])
    assert again["test"].keys() >= METRICS
    for name in METRICS:
        assert again["test"][name] == pytest.approx(summary["test"][name], abs=1e-6), name
    assert again["baselines"] == summary["baselines"]


def by_hand(run: Path) -> tuple[Metrics, Metrics]:
    """Test metrics of the model and of the constant predictor, one pair of images after the other."""
    plan = plan_resumed_run(run, ["parallel.expert_parallel_size=1"])
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model = build_model(plan.config, plan.task, groups.world).eval()
        assert isinstance(model, TwoImageClassifier)
        place_weights(model, read_model(newest_checkpoint(run)))
        model.begin_evaluation()
        rows = [model_row(model, plan.task.test, i) for i in range(len(plan.task.test))]
        constant = [constant_row(plan.task.train, plan.task.test, i) for i in range(len(plan.task.test))]
    return metrics_of(rows), metrics_of(constant)


def model_row(model: TwoImageClassifier, part: Any, index: int) -> list[float]:
    """Cross-entropies of both tasks, then whether each is right."""
    example = part.batch(np.array([index]), np.array([index]))
    with torch.no_grad():
        logits = [logit_BC[0].double().tolist() for logit_BC in model(example.image_BD).predictions]
    labels = example.label_BG[0].tolist()
    surprise = [math.log(sum(math.exp(x) for x in row)) - row[c] for row, c in zip(logits, labels, strict=True)]
    return surprise + [float(row.index(max(row)) == c) for row, c in zip(logits, labels, strict=True)]


def constant_row(train: Any, part: Any, index: int) -> list[float]:
    surprise, right = [], []
    for side in ("left_N", "right_N"):
        seen = [int(train.labels[i]) for i in getattr(train, side)]
        label = int(part.labels[getattr(part, side)[index]])
        counts = [seen.count(c) for c in range(10)]
        surprise.append(-math.log(counts[label] / len(seen)))
        right.append(float(counts.index(max(counts)) == label))
    return surprise + right


def metrics_of(rows: list[list[float]]) -> Metrics:
    first, second, right_first, right_second = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {
        "ce_top_left": first,
        "ce_bottom_right": second,
        "accuracy_top_left": right_first,
        "accuracy_bottom_right": right_second,
        "accuracy": (right_first + right_second) / 2,
        "loss": WEIGHTS[0] * first + WEIGHTS[1] * second,
    }


def test_metrics_by_hand(runs: dict[int, Path]) -> None:
    ((model, constant),) = on_ranks(1, by_hand, runs[1])
    summary = summary_of(runs[1])
    for metrics, expected in ((summary["test"], model), (summary["baselines"]["constant"], constant)):
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_hash_routing_knows_images_by_their_pixels(config: Path, tmp_path: Path) -> None:
    """Images have no ids; equal ones go to equal experts on one rank as on two."""
    for world in (1, 2):
        options = ["model.gate={name: hash}", "model.permutation=null", f"parallel.expert_parallel_size={world}"]
        succeed(world, "train", "--run-dir", tmp_path / str(world), config, *options)
    one, two = (records_of(tmp_path / str(world)) for world in (1, 2))
    torch.testing.assert_close(losses_of(tmp_path / "1"), losses_of(tmp_path / "2"), rtol=0, atol=1e-5)
    assert [record["load"] for record in one] == [record["load"] for record in two]
    assert all(record["active_experts"] == 1 and sum(record["load"][0]) == BATCH for record in one)
    assert sum(load > 0 for load in one[0]["load"][0]) > 1


def test_the_ids_of_images_are_counted(config: Path) -> None:
    """Balanced assignment deals out the training images' ids by how often they occur, not all ids alike."""
    options = ["model.gate={name: hash, assignment: balanced}", "model.permutation=null"]
    run_config = load_config(config, options)
    task = run_config.data.open(progress=False)
    images = [task.train.batch(np.array([i]), np.array([i])).image_BD for i in range(len(task.train))]
    expected = Counter(int(pixel_ids(image_1D)) for image_1D in images)
    counts = task.id_counts()
    assert counts.shape == (NUM_IDS,)
    assert {each: int(count) for each, count in enumerate(counts) if count} == expected
    assert expected.total() == 70
    for gate in build_model(run_config, task, SingleWorld()).moe.gates:
        assert isinstance(gate, HashRouting)
        assert torch.equal(gate.table, balanced_assignment(counts, 4))
        loads = torch.zeros(4, dtype=torch.int64).index_add_(0, gate.table, counts)
        assert loads.max() - loads.min() <= 1


def test_every_part_is_said(runs: dict[int, Path], config: Path) -> None:
    """The configuration that a run keeps names the model that fits the data."""
    kept = yaml.safe_load((runs[1] / "config.yaml").read_text())
    assert kept["model"]["name"] == "two_image_classifier"
    assert summary_of(runs[1])["data"]["counts"] == {"train": 70, "val": 14, "test": 18}
