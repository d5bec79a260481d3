"""Whole runs at ZeRO stage 3 and in bf16: what happens between steps and after the last one is right there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import newest_checkpoint
from tests.helpers.commands import succeed
from tests.helpers.runs import losses_of, stage_overrides, summary_of, write_config

BF16 = "deepspeed.bf16.enabled=true"
EXPERTS = "parallel.expert_parallel_size=2"
RUNS: dict[str, list[str]] = {
    "whole": stage_overrides(1),
    "sharded": stage_overrides(3),
    "bf16": [*stage_overrides(1), BF16],
    "bf16-sharded": [*stage_overrides(3), BF16],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Swap searches while training, and a permutation that is rounded at every step, also after a validation.

    The learning rate is one with which an early validation is the best.
    """
    root = tmp_path_factory.mktemp("sharded")
    config = write_config(
        root,
        tiny_data,
        model={"permutation": {"epochs": 0.1, "rounding": "relaxed", "forward": "hard"}},
        swap_search={"every_epochs": 0.1, "examples": 64},
        train={"max_steps": 80, "validate_every": 5, "patience": 2},
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
    )
    for name, options in RUNS.items():
        succeed(2, "train", "--run-dir", root / name, config, EXPERTS, *options)
    return root


def test_a_sharded_run_is_the_same_run(runs: Path) -> None:
    whole, sharded = (summary_of(runs / name) for name in ("whole", "sharded"))
    assert losses_of(runs / "sharded").tolist() == pytest.approx(losses_of(runs / "whole").tolist(), abs=1e-5)
    for part in ("val", "test"):
        for metric in ("loss", "bce", "mse", "auc", "active_experts"):
            assert sharded[part][metric] == pytest.approx(whole[part][metric], abs=1e-5), metric
    assert (sharded["steps"], sharded["tested_step"]) == (whole["steps"], whole["tested_step"])


@pytest.mark.parametrize("name", RUNS)
def test_the_best_weights_are_the_ones_tested(runs: Path, name: str) -> None:
    """Brought back into an engine that has trained on since, they validate as they did."""
    run = runs / name
    summary = summary_of(run)
    losses = json.loads((newest_checkpoint(run) / "trainer.json").read_text())["validation_losses"]
    assert summary["tested_step"] < summary["steps"]
    assert summary["val"]["loss"] == losses[str(summary["tested_step"])] == min(losses.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sharded_run_is_evaluated_anywhere(runs: Path, ranks: int) -> None:
    first, *_ = succeed(ranks, "evaluate", runs / "sharded", "--json")
    again, before = json.loads(first.out)["test"], summary_of(runs / "sharded")["test"]
    for metric in ("loss", "bce", "mse", "auc"):
        assert again[metric] == pytest.approx(before[metric], abs=1e-6)
