"""A resumed run is the undisturbed one to the bit, whatever has a state: searches, schedules, biases, patience."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine.checkpoint.files import best_of, checkpoints_of, newest_checkpoint
from dist_moe.engine.monitor.step_window import MACHINE_METRICS
from tests.helpers.commands import signalled, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, summary_of, tensors_of, validations_of, write_config

STEPS, VALIDATE, STOP_AT = 30, 4, 16
SEARCH = "swap_search={every_epochs: 0.06, examples: 200, least_gain: 0.0}"
ASSIGNMENT = "assignment_search={every_steps: 7, until_step: 28, examples: 64, verified_on: 64, least_gain: 0.0}"
WINDOW = "assignment_search={while_entropy: [1.0, 0.1], every_steps: 3, examples: 64, verified_on: 64, least_gain: 0.0}"
CASES: dict[str, list[str]] = {
    "comet, Sinkhorn phase": ["model.permutation.epochs=0.3"],
    "comet, swaps, accumulation": [SEARCH, "deepspeed.gradient_accumulation_steps=2"],
    "comet, permutation, then swaps": ["model.permutation.epochs=0.1", SEARCH, ASSIGNMENT],
    "comet, swaps while its trees harden": [WINDOW],
    "top_k, bias": ["model.gate={name: top_k, k: 2, balance_weight: 0.01, bias_update_rate: 0.05}"],
    "relu": ["model.gate={name: relu, k: 1, l1_weight: 0.01}"],
    "smoe_dropout, accumulation": ["model.gate={name: smoe_dropout}", "deepspeed.gradient_accumulation_steps=2"],
}

FAST = ("comet, permutation, then swaps", "comet, swaps while its trees harden", "top_k, bias")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Everything with dropout, a schedule, clipping and patience."""
    return write_config(
        tmp_path_factory.mktemp("exact"),
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}},
        train={"max_steps": STEPS, "log_every": 4, "validate_every": VALIDATE, "patience": 20, "checkpoint_every": 7},
        parallel={"expert_parallel_size": 2},
        deepspeed={
            "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": STEPS}},
            "gradient_clipping": 0.3,
        },
    )


def what_happened(run: Path) -> dict[str, Any]:
    trainer = json.loads((newest_checkpoint(run) / "trainer.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    return {
        "steps": [
            {key: value for key, value in record.items() if key not in MACHINE_METRICS} for record in records_of(run)
        ],
        "validations": validations_of(run),
        "trainer": {key: value for key, value in trainer.items() if key != "training_seconds"},
        "metrics": {key: summary[key] for key in ("val", "test", "steps", "tested_step")},
        "best": [path.name for path in best_of(checkpoints_of(run)).iterdir()],
    }


def searches_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if re.match("(swap|assignment) search after", line)]


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_resumed_and_undisturbed(config: Path, tmp_path: Path, case: str) -> None:
    """Stopped exactly at a validation, between two checkpoints, before search and schedule are at their ends."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    undisturbed = succeed(2, "train", "--run-dir", whole, config, *CASES[case])
    arguments = ["train", "--run-dir", str(run), str(config), *CASES[case]]
    stopped = on_ranks(2, signalled, signal.SIGTERM, STOP_AT, 1, arguments)
    assert all(outcome.code > 128 for outcome in stopped)
    assert newest_checkpoint(run).name == f"step-{STOP_AT:08d}"
    assert list(validations_of(run)) == list(range(VALIDATE, STOP_AT + 1, VALIDATE))
    resumed = succeed(2, "train", "--resume", run)
    assert what_happened(run) == what_happened(whole)
    assert list(validations_of(run)) == [*range(VALIDATE, STEPS, VALIDATE), STEPS]
    assert searches_of(stopped[0].err) + searches_of(resumed[0].err) == searches_of(undisturbed[0].err)
    assert bool(searches_of(resumed[0].err)) == ("swaps" in case)
    ours, theirs = tensors_of(run), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


def lines_of(run: Path) -> list[str]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [("v" if "validation" in line else "s") + str(line["step"]) for line in lines]


def test_a_run_that_once_ended_at_a_validation(config: Path, tmp_path: Path) -> None:
    """A run without patience does not validate its last step; one that is given more steps has that validation too."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train = ["train.patience=null", "parallel.expert_parallel_size=1"]
    succeed(1, "train", "--run-dir", whole, config, *train, "train.max_steps=10")
    succeed(1, "train", "--run-dir", run, config, *train, f"train.max_steps={VALIDATE}")
    assert validations_of(run) == {}
    seconds = summary_of(run)["training_seconds"]
    succeed(1, "train", "--resume", run, "train.max_steps=10")
    assert validations_of(run) == validations_of(whole)
    assert lines_of(run) == ["s1", "s2", "s3", "s4", "v4", "s5", "s6", "s7", "s8", "v8", "s9", "s10"] == lines_of(whole)
    assert summary_of(run)["training_seconds"] > seconds > 0


def test_the_time_of_a_finished_run_is_kept(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(1, "train", "--run-dir", run, config, "parallel.expert_parallel_size=1", "train.max_steps=8")
    before = summary_of(run)["training_seconds"]
    succeed(1, "train", "--resume", run)
    after = summary_of(run)
    assert (after["first_step"], after["steps"]) == (8, 8)
    assert 0.5 * before < after["training_seconds"] < before + 1.0
