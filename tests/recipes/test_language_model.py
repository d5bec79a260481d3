"""A language model with two MoE layers: one run at every layout, and everything that looks at its layers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_checkpoint
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.gates import SMoEDropout
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.tasks import build_model
from tests.helpers.board import last_image, read_board
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import (
    largest_difference,
    losses_of,
    records_of,
    stage_overrides,
    tensors_of,
    train_all,
)
from tests.helpers.texts import DOMAINS, write_lm_config

Layout = tuple[int, int, int]
"""Ranks, expert-parallel size, ZeRO stage."""
LAYOUTS: list[Layout] = [(1, 1, 0), (1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 3), (4, 4, 3)]
LAYERS = ("layers.1.moe", "layers.3.moe")
TOKENS, EXPERTS = 8 * 16, 4
STEPS, SAVED = 12, 6


def overrides(layout: Layout) -> list[str]:
    _, ep, stage = layout
    return [f"parallel.expert_parallel_size={ep}", *stage_overrides(stage)]


def name_of(layout: Layout) -> str:
    return "world{}-ep{}-zero{}".format(*layout)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    """Learns permutations for the first steps, so that runs meet both kinds of step."""
    train = {"checkpoint_every": SAVED, "keep_checkpoints": 9}
    return write_lm_config(
        tmp_path_factory.mktemp("lm"), tiny_text, model={"permutation": {"epochs": 0.3}}, train=train
    )


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    root = config.parent
    for layout in LAYOUTS:
        on_ranks(layout[0], train_all, config, {str(root / name_of(layout)): overrides(layout)})
    return root


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=name_of)
def test_the_same_run_at_every_layout(runs: Path, layout: Layout) -> None:
    reference, run = runs / name_of(LAYOUTS[0]), runs / name_of(layout)
    assert len(losses_of(run)) == STEPS
    torch.testing.assert_close(losses_of(run), losses_of(reference), rtol=0, atol=1e-5)
    assert largest_difference(tensors_of(run), tensors_of(reference)) < 1e-4
    for ours, theirs in zip(records_of(run), records_of(reference), strict=True):
        assert ours["load"] == theirs["load"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["total_loss"] == pytest.approx(theirs["total_loss"], abs=1e-5)


def test_it_learns_and_says_what_it_saw(runs: Path) -> None:
    run = runs / name_of(LAYOUTS[0])
    losses = losses_of(run)
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    for record in records_of(run):
        load_LE = np.asarray(record["load"])
        assert load_LE.shape == (2, EXPERTS)
        assert load_LE.sum() == record["rows_computed"]
        assert record["active_experts"] == pytest.approx(load_LE.sum() / (2 * TOKENS))
        assert record["loss"] == record["ce"]
    test = json.loads((run / "summary.json").read_text())["test"]
    assert len(test["active_experts_by_gate"]) == 2
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    assert test["bits_per_byte"] > 0
    assert {f"bits_per_byte_{name}" for name in DOMAINS} <= test.keys()


@pytest.mark.parametrize("layout", [(2, 1, 2), (1, 1, 1)], ids=name_of)
def test_resumed_at_another_world_size(runs: Path, tmp_path: Path, layout: Layout) -> None:
    """The same batches, as the load of every step tells, and the same losses."""
    written, run = runs / name_of((4, 4, 3)), tmp_path / "run"
    shutil.copytree(written, run)
    for directory in complete_directories(checkpoints_of(run))[1:]:
        shutil.rmtree(directory)
    succeed(layout[0], "train", "--resume", run, *overrides(layout))
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses_of(run), losses_of(written), rtol=0, atol=1e-5)
    assert [record["load"] for record in records_of(run)] == [record["load"] for record in records_of(written)]


def test_evaluate_knows_the_metrics_of_the_summary(runs: Path) -> None:
    run = runs / name_of((4, 2, 3))
    test = json.loads((run / "summary.json").read_text())["test"]
    for world in (1, 2):
        again = json.loads(succeed(world, "evaluate", run, "--json")[0].out)["test"]
        assert again["loss"] == pytest.approx(test["loss"], abs=1e-6)
        assert again["bits_per_byte"] == pytest.approx(test["bits_per_byte"], abs=1e-6)


DENSE = ["model.moe_every=0", "model.permutation=null"]


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    run = config.parent / "dense"
    succeed(1, "train", "--run-dir", run, config, *DENSE, *overrides((1, 1, 0)))
    return run


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_dense_model_trains_alike_at_every_layout(config: Path, dense: Path, tmp_path: Path, stage: int) -> None:
    succeed(2, "train", "--run-dir", tmp_path / "run", config, *DENSE, *overrides((2, 1, stage)))
    torch.testing.assert_close(losses_of(tmp_path / "run"), losses_of(dense), rtol=0, atol=1e-5)
    for run in (dense, tmp_path / "run"):
        for record in records_of(run):
            assert (record["load"], record["active_experts"], record["rows_computed"]) == ([], 0, 0)
        test = json.loads((run / "summary.json").read_text())["test"]
        assert (test["active_experts"], test["active_experts_by_gate"], test["dead_experts"]) == (0, [], 0)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("swap_search={}", ["swap_search needs experts", "set it to null"]),
        ("placement={}", ["placement needs experts", "set it to null"]),
        ("model.permutation={}", ["model.permutation needs experts", "set it to null"]),
        ("parallel.expert_parallel_size=2", ["parallel.expert_parallel_size=2 needs experts", "set it to 1"]),
        ("model.kv_heads=3", ["model.kv_heads=3 does not divide heads=2"]),
    ],
)
def test_what_does_not_go_with_a_dense_model(config: Path, tmp_path: Path, override: str, parts: list[str]) -> None:
    outcomes = dist_moe(2, "train", "--run-dir", tmp_path / "run", config, *DENSE, override)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    for part in parts:
        assert part in outcomes[0].err


def test_what_is_printed(config: Path, tmp_path: Path) -> None:
    """On the first rank alone: what the model is, the metrics with a line for each, and a sample."""
    first, second = succeed(2, "train", "--run-dir", tmp_path / "run", config, *overrides((2, 2, 1)))
    assert "comet+, 4 experts in each of 2 layers over 2 of 2 rank(s)" in first.err
    assert "of 8 examples of 16 tokens" in first.err
    for part in ("unigram predictor", "bits per byte cooking", "what the model writes", "[sailing]"):
        assert part in first.out
    assert "what the model writes" not in second.out


@pytest.mark.slow
def test_pictures_of_every_layer(config: Path, tmp_path: Path) -> None:
    options = ["train.max_steps=100", "train.log_every=50", "model.permutation.epochs=50"]
    succeed(1, "train", "--run-dir", tmp_path / "run", config, *options)
    board = read_board(tmp_path / "run")
    for tag in ("load_by_layer", "load_over_time", "effective_over_time"):
        assert last_image(board, f"experts/{tag}").min() < 255
    assert last_image(board, "permutation/slot_to_expert").min() < 255
    assert last_image(board, "test/effective_experts_by_layer").min() < 255
    worst = board.Scalars("experts/load_max_over_mean")[-1].value
    load_LE = np.asarray(records_of(tmp_path / "run")[-1]["load"])
    assert worst == pytest.approx((load_LE.max(axis=1) / load_LE.mean(axis=1)).max())


MOVING = "placement={every_steps: 4, threshold: 1, least_return: 0, slack: 0, window: 16}"
UNEVEN = ["model.gate={name: top_k, k: 1}", "model.permutation=null"]


@pytest.fixture(scope="module")
def staying(config: Path) -> Path:
    run = config.parent / "staying"
    succeed(2, "train", "--run-dir", run, config, *UNEVEN, *overrides((2, 2, 1)))
    return run


@pytest.mark.parametrize("layout", [(2, 2, 1), pytest.param((4, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_experts_of_every_layer_move_and_nothing_changes(config: Path, staying: Path, layout: Layout) -> None:
    run = config.parent / f"moving-{name_of(layout)}"
    succeed(layout[0], "train", "--run-dir", run, config, *UNEVEN, *overrides(layout), MOVING)
    placements = json.loads((newest_checkpoint(run) / "trainer.json").read_text())["placements"]
    assert placements.keys() == set(LAYERS)
    torch.testing.assert_close(losses_of(run), losses_of(staying), rtol=0, atol=1e-5)
    assert largest_difference(tensors_of(run), tensors_of(staying)) < 1e-4
    assert [record["load"] for record in records_of(run)] == [record["load"] for record in records_of(staying)]
    board = read_board(run)
    before, after = (board.Scalars(f"placement/imbalance_{when}")[0].value for when in ("before", "after"))
    load_LE = np.sum([record["load"] for record in records_of(run)[:SAVED]], axis=0)
    heaviest_L = np.maximum(load_LE[:, :2].sum(axis=1), load_LE[:, 2:].sum(axis=1)) / (load_LE.sum(axis=1) / 2)
    assert before == pytest.approx(heaviest_L.max())
    assert after <= before
    assert sum(event.value for event in board.Scalars("placement/moved_experts")) > 0
    assert len(board.Images("placement/rank_of_expert")) > 1


LEARNING = ["model.gate={name: top_k, k: 2}", "model.permutation=null", "deepspeed.optimizer.params.lr=0.03"]


@pytest.fixture(scope="module")
def learned(config: Path) -> Path:
    """A run after which experts matter."""
    run = config.parent / "learned"
    succeed(1, "train", "--run-dir", run, config, *LEARNING, "train.max_steps=30")
    return run


def test_swaps_in_every_layer(learned: Path, tmp_path: Path) -> None:
    """At any number of ranks the same search, which changes nothing but the tables of the layers that it names."""
    reports = []
    for world in (1, 2):
        output = tmp_path / f"found{world}"
        succeed(world, "search", learned, "--output", output, "examples=12", "least_gain=0")
        reports.append(json.loads((output / "swap_search.json").read_text()))
        before, after = tensors_of(learned), tensors_of(output)
        changed = [name for name in before if not before[name].equal(after[name])]
        assert sorted(changed) == [f"{name}.slot_map.table|buffer" for name in LAYERS]
    assert reports[0]["swaps"] == reports[1]["swaps"]
    assert {swap["layer"] for swap in reports[0]["swaps"]} == {0, 1}
    assert reports[0]["losses"] == pytest.approx(reports[1]["losses"], rel=1e-9)
    assert reports[0]["losses"] == sorted(reports[0]["losses"], reverse=True)
    assert reports[0]["local_optimum"]


def test_swaps_while_training(config: Path, learned: Path, tmp_path: Path) -> None:
    """A search that finds swaps changes the run from there on, alike on one rank and on two."""
    search = ["swap_search={every_epochs: 0.5, until_epoch: 0.6, examples: 12, least_gain: 0}", "train.max_steps=18"]
    for world in (1, 2):
        options = [*LEARNING, *overrides((world, world, 1)), *search]
        succeed(world, "train", "--run-dir", tmp_path / str(world), config, *options)
    one, two = (losses_of(tmp_path / str(world)) for world in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    (event,) = read_board(tmp_path / "1").Scalars("swap_search/swaps")
    assert event.value > 0
    assert torch.equal(one[: event.step], losses_of(learned)[: event.step])
    assert (one - losses_of(learned)[: len(one)]).abs().max() > 1e-4


def test_null_experts_leave_tokens_fewer_than_k(config: Path, tmp_path: Path) -> None:
    """AdaMoE: with as many nulls as experts, balanced, a token of k = 2 slots has about one expert."""
    gate = "model.gate={name: ada_moe, k: 2, null_slots: 4, balance_weight: 0.01}"
    succeed(2, "train", "--run-dir", tmp_path / "run", config, gate, "model.permutation=null", *overrides((2, 2, 1)))
    for record in records_of(tmp_path / "run"):
        assert 0.3 < record["active_experts"] < 1.7
        assert record["active_experts"] == pytest.approx(np.sum(record["load"]) / (2 * TOKENS))
        assert record["null_balance"] > 0


def test_smoe_dropout_follows_its_schedule(config: Path, tmp_path: Path) -> None:
    gate = "model.gate={name: smoe_dropout, k_min: 1, k_max: 4}"
    run = tmp_path / "run"
    succeed(2, "train", "--run-dir", run, config, gate, "model.permutation=null", *overrides((2, 2, 1)))
    expected = [SMoEDropout(16, 4, 1, 4, STEPS).k_at(step) for step in range(STEPS)]
    assert expected[0] == 1
    assert expected[-1] >= 3
    assert [record["active_experts"] for record in records_of(run)] == expected
    test = json.loads((run / "summary.json").read_text())["test"]
    assert test["active_experts_by_gate"] == [expected[-1]] * 2


def final_report(config: Path, options: list[str], directory: Path) -> str:
    plan = plan_new_run(config, options, directory)
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model: Any = build_model(plan.config, plan.task, groups.world)
        return plan.task.final_report(model)


def test_samples_are_the_same_on_every_rank(config: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, final_report, config, [], tmp_path / "run")
    both = on_ranks(2, final_report, config, ["parallel.expert_parallel_size=2"], tmp_path / "run")
    assert both == [alone, alone]
    assert alone.count("\n") >= 3
