"""Assignment search while training: on which examples, at which steps, with which controls, on how many ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.assignment_search import AssignmentScheduleConfig
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.tasks import build_model
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import succeed
from tests.helpers.runs import largest_difference, tensors_of, write_config

SEARCH = "assignment_search={at_steps: [4, 8], examples: 300, verified_on: 200, batch_size: 70, least_gain: 0}"
TABLE = "moe.slot_map.table|buffer"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    model = {"num_experts": 8, "gate": {"name": "comet", "k": 2, "gamma": 1.0}}
    return write_config(tmp_path_factory.mktemp("assignment"), tiny_data, model=model, train={"max_steps": 10})


def test_examples_are_training_ones_drawn_anew_for_each_step(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_config(config)
    task = loaded.data.open(progress=False)
    model, table, seen = build_model(loaded, task, SingleWorld()), type(task.train), list[set[int]]()
    batch = table.batch

    def spied(self: object, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> object:
        assert self is task.train
        if not seen or seen[-1] != set(step_index.tolist()):
            seen.append(set(step_index.tolist()))
        return batch(self, index_B, step_index)

    monkeypatch.setattr(table, "batch", spied)
    schedule = AssignmentScheduleConfig(examples=300, verified_on=200, max_moves=1)
    tables = []
    for step in (4, 4, 8):
        model.tables["moe"].table.copy_(torch.arange(8))
        schedule.search(task, model, loaded.target_weights, LaunchEnvironment(), 0, step)
        tables.append(model.tables["moe"].table.tolist())
    (fitted, verified), again, later = seen[:2], seen[2:4], seen[4:]
    assert (len(fitted), len(verified)) == (300, 200)
    assert not fitted & verified
    assert again == [fitted, verified]
    assert later != again
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"every_steps": 4, "until_step": 13}, [4, 8, 12]),
        ({"every_steps": 9, "until_step": None}, [9, 18]),
        ({"every_steps": 9, "at_steps": [2, 17]}, [2, 17]),
    ],
)
def test_the_steps_that_a_search_follows(options: dict[str, object], due: list[int]) -> None:
    schedule = AssignmentScheduleConfig(**options)
    assert [step for step in range(1, 20) if schedule.due(step, 5)] == due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "{every_steps: 11}",
            r"assignment_search\.every_steps=11: the first .* step 11, .* ends after 10; .* at most 10",
        ),
        ("{at_steps: [20, 12]}", r"assignment_search\.at_steps=\[20, 12\]: the first search would follow step 12"),
        ("{every_steps: 9, until_step: 8}", r"assignment_search\.until_step=8: .* every_steps=9, or null"),
    ],
)
def test_a_search_that_is_never_due_is_refused(config: Path, tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_new_run(config, [f"assignment_search={options}"], tmp_path / "run")


def test_ranks_find_the_tables_of_one_rank_and_a_control_that_takes_nothing_changes_nothing(
    config: Path, tmp_path: Path
) -> None:
    def train(name: str, ranks: int, *overrides: str) -> Path:
        run = tmp_path / name
        outcomes = succeed(
            ranks, "train", "--run-dir", run, config, f"parallel.expert_parallel_size={ranks}", *overrides
        )
        assert ("assignment search after step 4" in outcomes[0].err) == bool(overrides)
        return run

    alone, together = train("1", 1, SEARCH), train("2", 2, SEARCH)
    board = read_board(alone)
    assert steps_of(board, "assignment_search/loss_after") == [4, 8]
    assert sum(event.value for event in board.Scalars("assignment_search/swaps")) > 0
    table = tensors_of(alone)[TABLE]
    assert table.flatten().tolist() != list(range(8))
    assert torch.equal(tensors_of(together)[TABLE], table)
    assert largest_difference(tensors_of(alone), tensors_of(together)) < 1e-4
    control = train("control", 1, SEARCH, "assignment_search.control=identity")
    assert largest_difference(tensors_of(control), tensors_of(train("none", 1))) == 0
