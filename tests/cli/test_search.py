"""dist-moe search, and swap search while training, as people use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_moe.engine.checkpoint_files import newest_checkpoint, verify_checkpoint
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.runs import largest_difference, tensors_of, write_config

TABLE = "moe.permutation.table|buffer"


@pytest.fixture
def config(tmp_path: Path, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path, tiny_data, train={"max_steps": 60})


@pytest.fixture
def run(config: Path, tmp_path: Path) -> Path:
    """A trained run whose table is then scrambled in its checkpoint."""
    from dist_moe.engine.checkpoint import copy_with_buffers

    trained, scrambled = tmp_path / "trained", tmp_path / "scrambled"
    succeed(1, "train", config, "--run-dir", trained)
    (scrambled / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (scrambled / name).write_bytes((trained / name).read_bytes())
    table = {"moe.permutation.table": torch.tensor([[[1, 0, 3, 2]]])}
    copy_with_buffers(newest_checkpoint(trained), scrambled / "checkpoints", table)
    return scrambled


def test_search_writes_a_run_that_differs_in_its_table_only(run: Path, tmp_path: Path) -> None:
    outcomes = [
        succeed(ranks, "search", run, "--output", tmp_path / f"found{ranks}", "examples=300")[0] for ranks in (1, 2)
    ]
    found = [tmp_path / "found1", tmp_path / "found2"]
    for directory, outcome in zip(found, outcomes, strict=True):
        verify_checkpoint(newest_checkpoint(directory))
        before, after = tensors_of(run), tensors_of(directory)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == [TABLE]
        report = json.loads((directory / "swap_search.json").read_text())
        assert report["losses"][-1] < report["losses"][0]
        assert report["local_optimum"]
        assert f"by {len(report['swaps'])} swap(s)" in outcome.out
        evaluated = json.loads(succeed(1, "evaluate", directory, "--json")[0].out)
        assert evaluated["test"] == pytest.approx(report["test_after"], rel=1e-4)
    assert largest_difference(tensors_of(found[0]), tensors_of(found[1])) == 0


def test_search_refuses_a_used_output_and_a_wrong_option(run: Path, tmp_path: Path) -> None:
    (outcome,) = dist_moe(1, "search", run, "--output", run)
    assert outcome.code == 2
    assert str(run) in outcome.err
    (outcome,) = dist_moe(1, "search", run, "exampels=3")
    assert outcome.code == 2
    assert "did you mean examples?" in outcome.err
    (outcome,) = dist_moe(1, "search", tmp_path / "nothing")
    assert outcome.code == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_search_while_training(config: Path, tmp_path: Path, ranks: int) -> None:
    overrides = ["swap_search.every_epochs=0.25", "swap_search.examples=300", "swap_search.until_epoch=0.6"]
    split = [f"parallel.expert_parallel_size={ranks}"]
    (first, *_) = succeed(ranks, "train", config, "--run-dir", tmp_path / "run", *overrides, *split)
    assert "swap search after step 14" in first.err
    board = read_board(tmp_path / "run")
    searched = steps_of(board, "swap_search/loss_after")
    assert searched == [14, 28]
    losses = {tag: [e.value for e in board.Scalars(f"swap_search/{tag}")] for tag in ("loss_before", "loss_after")}
    assert all(after <= before for before, after in zip(*losses.values(), strict=True))
    assert sorted(load_file(newest_checkpoint(tmp_path / "run") / "dense.safetensors")[TABLE].flatten()) == [0, 1, 2, 3]
