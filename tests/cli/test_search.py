"""dist-moe search, and swap search while training, as people use them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.engine.checkpoint.files import newest_checkpoint, verify_checkpoint
from dist_moe.engine.checkpoint.loading import copy_with_buffers
from dist_moe.search.agreement import round_to_table
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import Outcome, dist_moe, run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import largest_difference, records_of, tensors_of, write_config

TABLE = "moe.slot_map.table|buffer"
SCRAMBLED = torch.tensor([[[3, 2, 1, 0]]])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("search"), tiny_data, train={"max_steps": 60})


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """A trained run whose table is then scrambled in its checkpoint."""
    succeed(1, "train", config, "--run-dir", config.with_name("trained"))
    return with_buffer(config.with_name("trained"), config.with_name("scrambled"), "table", SCRAMBLED)


def with_buffer(trained: Path, scrambled: Path, name: str, buffer: Tensor) -> Path:
    """A copy of a run with another ``buffer`` of its permutation in the checkpoint."""
    (scrambled / "checkpoints").mkdir(parents=True)
    for file in ("config.yaml", "environment.json"):
        (scrambled / file).write_bytes((trained / file).read_bytes())
    copy_with_buffers(newest_checkpoint(trained), scrambled / "checkpoints", {f"moe.slot_map.{name}": buffer})
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
        for metric in ("loss", "auc", "active_experts"):
            assert evaluated["test"][metric] == pytest.approx(report["test_after"][metric], rel=1e-4), metric
    assert largest_difference(tensors_of(found[0]), tensors_of(found[1])) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_search_of_a_run_that_still_learns_its_permutation(config: Path, tmp_path: Path, ranks: int) -> None:
    """The swaps are made in the rounding of what was learnt, and nothing rounds again after them."""
    trained, output = tmp_path / "trained", tmp_path / "found"
    succeed(1, "train", config, "--run-dir", trained, "model.permutation={epochs: 100}")
    learnt = round_to_table(tensors_of(trained)["moe.slot_map.soft|buffer"][0, 0])
    soft = torch.eye(4)[learnt[SCRAMBLED]]
    run = with_buffer(trained, tmp_path / "scrambled", "soft", soft)
    succeed(ranks, "search", run, "--output", output, "examples=300")
    report = json.loads((output / "swap_search.json").read_text())
    table = learnt[SCRAMBLED]
    assert report["swaps"]
    for swap in report["swaps"]:
        (a, b), expert_S = swap["slots"], table[tuple(swap["row"])]
        expert_S[a], expert_S[b] = expert_S[b].clone(), expert_S[a].clone()
    before, after = tensors_of(run), tensors_of(output)
    assert torch.equal(after[TABLE], table)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {TABLE, "moe.slot_map.step|buffer"}
    evaluated = json.loads(succeed(1, "evaluate", output, "--json")[0].out)["test"]
    for metric in ("loss", "auc", "active_experts"):
        assert evaluated[metric] == pytest.approx(report["test_after"][metric], rel=1e-4), metric
    assert report["test_after"]["loss"] != report["test_before"]["loss"]


def run_within(directory: Path, arguments: list[str]) -> Outcome:
    before = Path.cwd()
    os.chdir(directory)
    try:
        return run_here(arguments)
    finally:
        os.chdir(before)


def test_search_from_within_the_run(run: Path) -> None:
    (outcome,) = on_ranks(1, run_within, run, ["search", ".", "examples=100", "max_swaps=1"])
    assert outcome.code == 0, outcome.err
    verify_checkpoint(newest_checkpoint(run.with_name("scrambled-search")))
    assert json.loads((run.with_name("scrambled-search") / "swap_search.json").read_text())["losses"]


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
    assert "swap search after step 22" in first.err
    board = read_board(tmp_path / "run")
    searched = steps_of(board, "swap_search/loss_after")
    assert searched == [22, 44]
    losses = {tag: [e.value for e in board.Scalars(f"swap_search/{tag}")] for tag in ("loss_before", "loss_after")}
    assert all(after <= before for before, after in zip(*losses.values(), strict=True))
    assert sorted(load_file(newest_checkpoint(tmp_path / "run") / "dense.safetensors")[TABLE].flatten()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("stage", "searched"), [("0.25", [22, 44]), ("0.27", [44]), ("100", [])])
def test_no_swaps_are_searched_while_a_permutation_is_learnt(
    config: Path, tmp_path: Path, stage: str, searched: list[int]
) -> None:
    """A stage that ends with the step after which the first search is due, one that ends later, one that lasts."""
    overrides = ["swap_search.every_epochs=0.25", "swap_search.examples=100", "train.max_steps=46"]
    succeed(1, "train", config, "--run-dir", tmp_path / "run", *overrides, f"model.permutation.epochs={stage}")
    board = read_board(tmp_path / "run")
    tags = board.Tags()["scalars"]
    assert (steps_of(board, "swap_search/loss_after") if "swap_search/loss_after" in tags else []) == searched


def test_the_traffic_of_a_search_is_no_step_s(config: Path, tmp_path: Path) -> None:
    """A search that takes no swap changes nothing, not even what is recorded of the steps."""
    overrides = ["train.max_steps=12", "parallel.expert_parallel_size=2"]
    search = "swap_search={every_epochs: 0.05, examples: 200, max_swaps: 0}"
    (first, *_) = succeed(2, "train", config, "--run-dir", tmp_path / "with", *overrides, search)
    assert "swap search after step 4" in first.err
    succeed(2, "train", config, "--run-dir", tmp_path / "without", *overrides)
    ours, theirs = (
        [(r["wire_rows"], r["wire_bytes"]) for r in records_of(tmp_path / name)] for name in ("with", "without")
    )
    assert len(ours) == 12
    assert all(rows > 0 for rows, _ in ours)
    assert ours == theirs
