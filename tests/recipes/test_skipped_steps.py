"""A step whose gradient is not finite on one rank is left out on all: nothing of it remains anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.checkpoint.format import read_trainer_state
from dist_moe.engine.training import Trainer
from dist_moe.recording import Recorder
from tests.helpers.board import read_board
from tests.helpers.commands import Outcome, run_here
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, tensors_of, train_all, write_config

STEPS, BAD = 6, 3
GATE = {"name": "top_k", "k": 2, "bias_update_rate": 0.01}
CELLS = [
    (1, 1, 0, 2),
    (1, 1, 1, 1),
    (1, 1, 2, 2),
    (1, 1, 3, 1),
    (2, 2, 0, 2),
    (2, 2, 1, 2),
    (2, 2, 2, 1),
    (2, 2, 3, 2),
    (2, 1, 0, 1),
    (2, 1, 1, 1),
    (2, 1, 2, 2),
    (2, 1, 3, 1),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(
        tmp_path_factory.mktemp("skipped"),
        tiny_data,
        model={"experts": {"units": 16, "dropout": 0.3}, "gate": GATE},
        train={"max_steps": STEPS},
        deepspeed={"gradient_clipping": 1.0, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}},
    )


def poison(feed: ShuffledFeed[Any], step: int, batches: list[Any], bad_steps: Collection[int]) -> list[Any]:
    """The last rank's last micro-batch of some steps holds a rating that is not finite."""
    last_rank = feed._shape[1] - 1
    if step + 1 not in bad_steps or feed._rank != last_rank:
        return batches
    rating_B = batches[-1].rating_B.clone()
    rating_B[0] = math.inf
    return [*batches[:-1], replace(batches[-1], rating_B=rating_B)]


def poisoned_runs(config: Path, runs: dict[str, list[str]], bad_steps: Collection[int]) -> None:
    micro_batches = ShuffledFeed.micro_batches
    ShuffledFeed.micro_batches = lambda self, step: poison(self, step, micro_batches(self, step), bad_steps)
    try:
        train_all(config, runs)
    finally:
        ShuffledFeed.micro_batches = micro_batches


def runs_without(config: Path, runs: dict[str, list[str]], left_out: int) -> None:
    """The same runs, in which a step does not happen at all."""
    train_step = Trainer._train_step

    def train_others(self: Trainer, recorder: Recorder) -> None:
        if self.step + 1 == left_out:
            self.step += 1
        else:
            train_step(self, recorder)

    Trainer._train_step = train_others
    try:
        train_all(config, runs)
    finally:
        Trainer._train_step = train_step


def layouts(root: Path, kind: str, world: int, ep: int) -> dict[str, list[str]]:
    return {
        str(root / f"{kind}-{world}-{ep}-{stage}-{accumulation}"): [
            f"parallel.expert_parallel_size={ep}",
            f"deepspeed.zero_optimization.stage={stage}",
            f"deepspeed.gradient_accumulation_steps={accumulation}",
        ]
        for ranks, size, stage, accumulation in CELLS
        if (ranks, size) == (world, ep)
    }


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    root = config.parent
    for world, ep in ((1, 1), (2, 2), (2, 1)):
        on_ranks(world, poisoned_runs, config, layouts(root, "poisoned", world, ep), range(BAD, BAD + 1))
        on_ranks(world, runs_without, config, layouts(root, "without", world, ep), BAD)
    return root


def test_its_record_is_json_and_says_what_was_not_finite(runs: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (runs / "poisoned-1-1-1-1" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    bad = records[BAD - 1]
    assert (bad["step"], bad["loss"], bad["not_finite"]["loss"]) == (BAD, None, "inf")
    assert all("not_finite" not in record for record in records if record["step"] != BAD)


@pytest.mark.parametrize(("world", "ep", "stage", "accumulation"), CELLS)
def test_nothing_of_the_step_remains(runs: Path, world: int, ep: int, stage: int, accumulation: int) -> None:
    """Masters, moments, their step counter, the gate's bias: bit for bit those of a run without the step."""
    cell = f"{world}-{ep}-{stage}-{accumulation}"
    poisoned, without = tensors_of(runs / f"poisoned-{cell}"), tensors_of(runs / f"without-{cell}")
    assert poisoned.keys() == without.keys()
    assert [name for name in poisoned if not poisoned[name].equal(without[name])] == []
    assert any(name.endswith("bias_steps|buffer") and tensor.any() for name, tensor in poisoned.items())
    trainers = [
        read_trainer_state(runs / f"{kind}-{cell}/checkpoints/step-{STEPS:08d}") for kind in ("poisoned", "without")
    ]
    assert replace(trainers[0], training_seconds=0.0) == replace(trainers[1], training_seconds=0.0)
    records = records_of(runs / f"poisoned-{cell}")
    assert [record["skipped"] for record in records] == [float(step == BAD) for step in range(1, STEPS + 1)]
    assert not math.isfinite(records[BAD - 1]["grad_norm"])


def test_the_board_shows_it(runs: Path) -> None:
    events = read_board(runs / "poisoned-1-1-1-1").Scalars("optimizer/skipped")
    assert [(event.step, event.value) for event in events] == [
        (step, float(step == BAD)) for step in range(1, STEPS + 1)
    ]


def poisoned_command(arguments: list[str], bad_steps: Collection[int]) -> Outcome:
    micro_batches = ShuffledFeed.micro_batches
    ShuffledFeed.micro_batches = lambda self, step: poison(self, step, micro_batches(self, step), bad_steps)
    try:
        return run_here(arguments)
    finally:
        ShuffledFeed.micro_batches = micro_batches


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 2)])
def test_too_many_end_the_run(config: Path, tmp_path: Path, world: int, stage: int) -> None:
    """In a row: step 2 alone does not. On all ranks with the same sentence, which names the place; the records up to
    there are kept."""
    layout = [f"parallel.expert_parallel_size={world}", f"deepspeed.zero_optimization.stage={stage}"]
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "run"), *layout, "train.max_skipped_steps=2"]
    outcomes: list[Outcome] = on_ranks(world, poisoned_command, arguments, [2, *range(4, 99)])
    assert [outcome.code for outcome in outcomes] == [3] * world
    said = outcomes[0].err
    assert "2 step(s) in a row, 4..5," in said
    assert f"is the loss mse, though the outputs of all layers are finite, on rank {world - 1}" in said
    assert [record["step"] for record in records_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
