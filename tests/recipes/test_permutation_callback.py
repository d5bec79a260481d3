"""What a run says of its permutation search: rows changed, entropy, gain of rounding, a warning where none moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_moe.data.batches import spread_over
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.layer import DenseReplay
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.permutation import TOKENS, PermutationCallback
from dist_moe.recipes.callbacks.table_search import batches_of, ready_to_search, task_loss
from dist_moe.recipes.recipe import load_config
from dist_moe.search import PermutationSearch
from dist_moe.tasks import build_model
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import run_here
from tests.helpers.runs import summary_of, write_config


def test_rounding_gain_is_the_loss_with_the_soft_matrix_less_that_with_the_table(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    config = load_config(write_config(tmp_path, tiny_data, model={"permutation": {"epochs": 1}}))
    task = config.data.open(progress=False)
    model = build_model(config, task, SingleWorld())
    search = model.tables["moe"]
    assert isinstance(search, PermutationSearch)
    search.step.fill_(3)
    search.soft.copy_(torch.eye(4)[[2, 0, 3, 1]] * 0.6 + 0.1)
    trainer: Any = SimpleNamespace(model=model, groups=SimpleNamespace(environment=LaunchEnvironment()))
    gain = PermutationCallback(task, config.target_weights)._rounding_gain(trainer, [search])
    rows = spread_over(len(task.val), TOKENS)
    (batch,) = batches_of(task.val, rows, len(rows), LaunchEnvironment())
    loss = task_loss(task, model.eval(), config.target_weights)
    gates = len(model.moe_layers["moe"].gates)
    losses = []
    for matrix in (search.soft[0], torch.eye(4)[[2, 0, 3, 1]].unsqueeze(0)):
        replay = model.moe_layers["moe"].replayed_by(DenseReplay([matrix.double()] * gates))
        with ready_to_search(model), torch.no_grad(), replay:
            losses.append(loss(batch).item())
    assert search.table.flatten().tolist() == [2, 0, 3, 1]
    assert gain == pytest.approx(losses[0] - losses[1], abs=1e-9)
    assert abs(gain) > 1e-7


@pytest.mark.parametrize(("options", "warns"), [("schedule: paper", True), ("control: random", False)])
def test_a_run_records_its_stage_and_warns_where_no_row_moved(
    tmp_path: Path, tiny_data: dict[str, str], options: str, warns: bool
) -> None:
    """The rate is so low that the paper's schedule moves nothing; of a control nobody expects that."""
    config = write_config(tmp_path, tiny_data, train={"max_steps": 12, "log_every": 5})  # steps 6 to 10: it ends within
    rate = "deepspeed.optimizer.params.lr=1e-6"
    stage = f"model.permutation={{epochs: 0.1, {options}}}"
    outcome = run_here(["train", str(config), "--run-dir", str(tmp_path / "run"), rate, stage])
    assert outcome.code == 0, outcome.err
    found = summary_of(tmp_path / "run")["permutation"]
    assert found["layers"]["moe"]["rows_changed"] == 0
    assert found["layers"]["moe"]["rows"] == 4
    assert "permutation search until step 9: 0 of 4 rows changed" in outcome.err
    assert ("search without effect: the permutation search has moved no row of moe" in outcome.err) == warns
    board = read_board(tmp_path / "run")
    assert steps_of(board, "permutation_search/rows_changed") == [5, 9]
    assert steps_of(board, "permutation_search/rounding_gain") == [9]
    assert steps_of(board, "permutation/rows_changed") == [9, 10, 11, 12], "those of the table in use"
    entropies = [event.value for event in board.Scalars("permutation_search/entropy")]
    assert entropies[-1] == pytest.approx(found["layers"]["moe"]["entropy"], rel=1e-5)
