"""Mowst's turns on a tiny graph: what is held still stays bit for bit, the best is kept, a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from dist_moe.engine.checkpoint import files, newest_checkpoint, read_model
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import load_config
from tests.data.graphs.tiny_graphs import write_csv
from tests.helpers.commands import run_here, succeed

TINY: dict[str, Any] = {
    "recipe": {"name": "mowst", "max_sessions": 2, "session_patience": 9, "pretrain": "weak"},
    "data": {"name": "graph"},
    "model": {
        "name": "weak_strong",
        "weak": {"name": "mlp", "hidden": 8, "norm": "batch", "dropout": 0.0},
        "strong": {"name": "gcn", "hidden": 8, "norm": "batch", "dropout": 0.0},
    },
    "train": {"batch_size": 28, "epochs": 6, "patience": 3, "log_every": 10},
    "deepspeed": {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 0},
    },
}
STAGES = ["alone-strong", "alone-weak", "inference"]
SESSIONS = [f"session-{number:02}-{part}" for number in (1, 2) for part in ("strong", "weak")]


def write_config(root: Path, **sections: Any) -> Path:
    """TINY on a graph of its own; what is no section replaces."""
    graph = root / "graph"
    if not graph.exists():
        write_csv(graph)
    content = TINY | {"data": {"name": "graph", "root": str(graph), "cache": str(root / "cache")}}
    content |= {name: content.get(name, {}) | section for name, section in sections.items()}
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mowst")
    outcome = run_here(["train", str(write_config(root)), "--run-dir", str(root / "run")])
    assert outcome.code == 0, outcome.err
    assert "gcn alone" in outcome.out
    assert "nodes that ask the strong one" in outcome.out
    return root / "run"


def weights(stage: Path, *, best: bool = True) -> dict[str, Tensor]:
    return dict(read_model((files.tested_checkpoint if best else newest_checkpoint)(stage)))


def results(run: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("stages/*/result.json"))}


def test_every_stage_has_a_result(trained: Path) -> None:
    assert sorted(results(trained)) == sorted(STAGES + SESSIONS)
    for part in ("weak", "strong"):
        assert results(trained)[f"alone-{part}"]["test"]["accuracy"] > 0


def test_what_is_held_still_stays_bit_for_bit(trained: Path) -> None:
    """Parameters and buffers of batch normalisation, in the best weights of a turn and in its last ones."""
    found = results(trained)
    before: dict[str, Tensor] | None = None
    losses: dict[str, float] = {}
    for stage in (f"session-{number:02}-{part}" for number in (1, 2) for part in ("weak", "strong")):
        part = stage.rpartition("-")[2]
        own = ("layer.weak.", "layer.confidence.") if part == "weak" else ("layer.strong.",)
        for best in (True, False):
            after = weights(trained / "stages" / stage, best=best)
            if before is not None:
                changed = {name for name in after if not after[name].equal(before[name])}
                assert changed
                assert all(name.startswith(own) for name in changed), (stage, changed)
                assert any("running_mean" in name for name in changed)
        losses[stage] = found[stage]["loss"]
        before = weights(trained / "stages" / min(losses, key=lambda name: losses[name]))


def test_a_network_alone_is_what_supervised_training_gives(trained: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    content = yaml.safe_load(config.read_text())
    content |= {"recipe": "supervised", "model": {"name": "node_classifier", "network": content["model"]["strong"]}}
    config.write_text(yaml.safe_dump(content))
    outcome = run_here(["train", str(config), "--run-dir", str(tmp_path / "run")])
    assert outcome.code == 0, outcome.err
    ours, theirs = weights(trained / "stages" / "alone-strong"), weights(tmp_path / "run")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    test = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert results(trained)["alone-strong"]["test"] == test
    evaluated = run_here(["evaluate", "--json", str(trained / "stages" / "alone-strong")])
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["test"]["accuracy"] == test["accuracy"]


def test_a_network_begins_as_trained_alone(tmp_path: Path) -> None:
    """The first turn of the weak network holds the strong one still: it is what was trained alone, buffers too."""
    config = write_config(tmp_path, recipe={"pretrain": "both", "max_sessions": 1})
    assert run_here(["train", str(config), "--run-dir", str(tmp_path / "run")]).code == 0
    alone, first = (weights(tmp_path / "run" / "stages" / stage) for stage in ("alone-strong", "session-01-weak"))
    assert all(first[f"layer.strong.{name.removeprefix('network.')}"].equal(alone[name]) for name in alone)
    assert any("running_mean" in name for name in alone)


def test_the_best_turn_is_the_result_and_its_loss_is_real(trained: Path) -> None:
    """The kept loss never rises, it is that of the validation nodes, and ``evaluate`` gives the summary's figures."""
    found = results(trained)
    summary = json.loads((trained / "summary.json").read_text())
    losses = {stage: found[stage]["loss"] for stage in summary["turns"]}
    assert summary["best"] == min(losses, key=lambda stage: losses[stage])
    assert summary["turns"] == losses
    assert summary["val"]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    evaluated = run_here(["evaluate", "--json", str(trained)])
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["test"]["accuracy"] == pytest.approx(summary["test"]["accuracy"])
    assert (trained / "deciles.png").stat().st_size > 1000


def test_what_answers_at_the_end(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    found, test = summary["inference"], summary["test"]
    assert found["expected_accuracy"] == pytest.approx(test["accuracy"])
    assert test["accuracy"] <= max(test["accuracy_weak"], test["accuracy_strong"]) + 1e-9
    assert 0 <= found["threshold"]["strong_share"] <= 1
    assert all(cost > 0 for cost in found["microseconds_per_test_node"].values())
    assert len(test["deciles"]) == 10
    assert [group["confidence"] for group in test["deciles"]] == sorted(g["confidence"] for g in test["deciles"])


def test_a_run_that_lost_its_last_stages_goes_on_to_the_same_end(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for stage in ("session-02-strong", "inference"):
        shutil.rmtree(run / "stages" / stage)
    kept = (run / "stages" / "session-02-weak" / "result.json").stat().st_mtime_ns
    outcome = run_here(["train", "--resume", str(run)])
    assert outcome.code == 0, outcome.err
    assert (run / "stages" / "session-02-weak" / "result.json").stat().st_mtime_ns == kept
    ours, theirs = (weights(root / "stages" / "session-02-strong") for root in (run, trained))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert results(run)["session-02-strong"] == results(trained)["session-02-strong"]


def test_ranks_share_the_nodes_and_change_nothing(tmp_path: Path) -> None:
    """With SGD: Adam makes steps of full size of what rounding leaves of a gradient that is zero."""
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    config = write_config(tmp_path, recipe={"max_sessions": 1, "compare": False}, deepspeed=sgd)
    assert run_here(["train", str(config), "--run-dir", str(tmp_path / "1")]).code == 0
    for world in (2, 4):
        succeed(world, "train", config, "--run-dir", tmp_path / str(world))
    for stage in ("alone-weak", *SESSIONS[:2]):
        alone = weights(tmp_path / "1" / "stages" / stage, best=False)
        for world in ("2", "4"):
            shared = weights(tmp_path / world / "stages" / stage, best=False)
            for name in alone:
                torch.testing.assert_close(shared[name], alone[name], rtol=1e-4, atol=1e-5, msg=f"{stage} {name}")
    assert results(tmp_path / "4")["session-01-strong"]["loss"] == pytest.approx(
        results(tmp_path / "1")["session-01-strong"]["loss"], rel=1e-5
    )


def planted(path: Path) -> Path:
    """A graph of two kinds of nodes: of the first half features tell the class and edges are noise; of the others the
    edges tell it, to neighbours of the first half, and features are noise."""
    rng = np.random.default_rng(0)
    label_N = rng.integers(3, size=600)
    told_N = np.arange(600) < 300
    features_ND = rng.normal(size=(600, 6)) * 0.3
    features_ND[np.arange(600), label_N] += np.where(told_N, 2.0, 0.0)
    edges = [(int(rng.integers(300)), node) for node in range(300) for _ in range(9)]
    for node in range(300, 600):
        alike = np.flatnonzero(told_N & (label_N == label_N[node]))
        edges += [(int(source), node) for source in rng.choice(alike, 4)]
    part_N = rng.permutation(np.repeat([0, 0, 1, 2], 150))
    masks = {f"{part}_mask": part_N == i for i, part in enumerate(("train", "val", "test"))}
    np.savez(path, features=features_ND, edges=np.array(edges).T, labels=label_N, **masks)
    return path


def test_the_confidence_learns_whose_features_tell(tmp_path: Path) -> None:
    """The soft split: the weak network is trusted where features alone predict, the strong one asked elsewhere, and
    both together are right more often than the weak one alone and than the strong one alone."""
    root = str(planted(tmp_path / "planted.npz"))
    data = {"name": "graph", "root": root, "cache": str(tmp_path / "cache"), "directed": True}
    content = TINY | {"data": data, "recipe": {"name": "mowst", "max_sessions": 2, "session_patience": 1}}
    content |= {"train": {"batch_size": 300, "epochs": 60, "patience": 5, "validate_every": 5}}
    content["model"] = {"name": "weak_strong", "weak": {"name": "mlp", "hidden": 16, "dropout": 0.0}}
    content["model"] |= {"strong": {"name": "gcn", "layers": 1, "dropout": 0.0}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run_here(["train", str(path), "--run-dir", str(tmp_path / "run")]).code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    test, alone = summary["test"], {part: of["test"]["accuracy"] for part, of in summary["alone"].items()}
    assert test["accuracy"] > max(alone.values()) + 0.02, (test, alone)
    assert 0.2 < test["strong_share"] < 0.8
    least, most = test["deciles"][0], test["deciles"][-1]
    assert least["strong"] > least["weak"] + 0.1
    assert most["weak"] > 0.95
    assert most["confidence"] > least["confidence"] + 0.5


@pytest.mark.parametrize("mixture", ["predictions", "logits"])
def test_mowst_star_trains_all_at_once(tmp_path: Path, mixture: str) -> None:
    recipe = {"name": "mowst_star", "compare": False, "pretrain": "none"}
    config = write_config(tmp_path, recipe=recipe, model={"mixture": mixture, "confidence": {"map": "monotone"}})
    outcome = run_here(["train", str(config), "--run-dir", str(tmp_path / "run")])
    assert outcome.code == 0, outcome.err
    assert sorted(results(tmp_path / "run")) == ["inference", "together"]
    test = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert test["accuracy"] * 15 == pytest.approx(round(test["accuracy"] * 15))  # no chance decides


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model={name: node_classifier}", "recipe.name=mowst: for model.name=weak_strong, not node_classifier"),
        ("model.mixture=logits", "model.mixture=logits: recipe.name=mowst trains on losses"),
        ("recipe.name=mowst_star", "model.mixture=losses: recipe.name=mowst_star trains on predictions or logits"),
        ("train.patience=null", "train.patience=null: recipe.name=mowst ends a turn by it; give a number"),
        ("model.strong.name=gats", "model.strong.name='gats' is not a network; did you mean gat?"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path), [override]).check(1)
    assert said in str(error.value)
