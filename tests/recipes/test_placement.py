"""Experts that change their ranks while a run trains: the same run, lighter ranks, and it can be interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.config.files import digest_of
from dist_moe.engine.checkpoint.files import (
    checkpoints_of,
    complete_directories,
    newest_checkpoint,
    publish,
    read_manifest,
    step_directory,
)
from dist_moe.parallel import Placement
from dist_moe.recipes.callbacks.placement import co_activations
from dist_moe.routing import Route, union_of_routes
from dist_moe.search import rank_imbalance
from dist_moe.search.placement_policy import MoveCosts, PlacementScheduleConfig, propose
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import largest_difference, losses_of, records_of, tensors_of, train_all, write_config

EXPERTS, STEPS, EVERY, SAVED, COLLECTED = 8, 14, 5, 8, 4
FAST = [(2, 2, 0), (2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2)]
SLOW = [(4, 2, 0), (4, 4, 0), (4, 4, 1), (4, 4, 2)]
CELLS = [*FAST, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)]
IDENTITY_OF_8 = Placement.identity(EXPERTS, 2)
MOVING = f"placement={{every_steps: {EVERY}, threshold: 1, least_return: 0, slack: 0, window: 16}}"


def layout(ep: int, stage: int) -> list[str]:
    return [f"parallel.expert_parallel_size={ep}", f"deepspeed.zero_optimization.stage={stage}"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """A gate whose experts are loaded unequally from the first step on."""
    return write_config(
        tmp_path_factory.mktemp("placement"),
        tiny_data,
        model={"num_experts": EXPERTS, "gate": {"name": "top_k", "k": 2}},
        train={"max_steps": STEPS, "log_every": COLLECTED, "checkpoint_every": SAVED, "keep_checkpoints": 9},
        deepspeed={
            "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
            "gradient_clipping": 0.3,
        },
    )


@pytest.fixture(scope="module")
def staying(config: Path) -> Path:
    """A run whose experts stay where they are."""
    run = config.parent / "staying"
    on_ranks(2, train_all, config, {str(run): layout(2, 1)})
    return run


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    """Where runs are whose experts move, by layout and stage; see ``moving``."""
    return config.parent


def moving(runs: Path, world: int, ep: int, stage: int) -> Path:
    """The run, trained when it is asked for first."""
    run = runs / f"world{world}-ep{ep}-zero{stage}"
    if not run.exists():
        succeed(world, "train", "--run-dir", run, runs / "config.yaml", *layout(ep, stage), MOVING)
    return run


def trainer_of(run: Path, step: int = STEPS) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((step_directory(checkpoints_of(run), step) / "trainer.json").read_text())
    return content


def placement_of(run: Path, step: int = STEPS) -> Placement:
    """As its checkpoint has it; runs of this file have expert-parallel groups of 2 where it is absent."""
    saved = trainer_of(run, step)["placements"].get("moe")
    return Placement(tuple(saved["expert_of_position"]), saved["num_ranks"]) if saved else IDENTITY_OF_8


@pytest.mark.parametrize(("world", "ep", "stage"), CELLS)
def test_the_same_run_as_if_no_expert_had_moved(staying: Path, runs: Path, world: int, ep: int, stage: int) -> None:
    run = moving(runs, world, ep, stage)
    assert trainer_of(staying)["placements"] == {}
    assert len({placement_of(run, SAVED), placement_of(run, STEPS)}) == 2
    torch.testing.assert_close(losses_of(run), losses_of(staying), rtol=0, atol=1e-5)
    assert largest_difference(tensors_of(run), tensors_of(staying)) < 1e-5
    assert [record["load"] for record in records_of(run)] == [record["load"] for record in records_of(staying)]


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2)])
def test_what_a_look_shows(runs: Path, world: int, ep: int) -> None:
    """Looks after steps 5 and 10, at the steps collected by then."""
    run = moving(runs, world, ep, 1)
    board, records = read_board(run), records_of(run)
    names = ("imbalance_before", "imbalance_after", "imbalance_bound", "moved_experts", "bytes")
    shown = {name: [event.value for event in board.Scalars(f"placement/{name}")] for name in names}
    assert steps_of(board, "placement/bytes") == [EVERY, 2 * EVERY]
    placements = [Placement.identity(EXPERTS, ep), placement_of(run, SAVED), placement_of(run, STEPS)]
    for look, recorded in enumerate((COLLECTED, 2 * COLLECTED)):
        load_E = np.sum([record["load"][0] for record in records[:recorded]], axis=0)
        before, after = (rank_imbalance(load_E, placement) for placement in placements[look : look + 2])
        assert shown["imbalance_before"][look] == pytest.approx(before)
        assert shown["imbalance_after"][look] == pytest.approx(after)
        assert shown["imbalance_bound"][look] - 1e-6 <= after < before
        moved = placements[look].moved_to(placements[look + 1])
        assert shown["moved_experts"][look] == len(moved) > 0
        numbers = 16 * 16 + 16
        assert shown["bytes"][look] == len(moved) * (world // ep) * numbers * 3 * 4


@pytest.fixture
def interrupted(runs: Path, tmp_path: Path) -> Path:
    """A run on 2 ranks as if it had died after its first checkpoint, which was between two moves."""
    run = tmp_path / "interrupted"
    shutil.copytree(moving(runs, 2, 2, 1), run)
    for directory in complete_directories(checkpoints_of(run))[1:]:
        shutil.rmtree(directory)
    return run


def test_a_resumed_run_goes_on_where_its_experts_were(runs: Path, interrupted: Path) -> None:
    """The second look finds the load of the steps before the interruption."""
    whole = moving(runs, 2, 2, 1)
    succeed(2, "train", "--resume", interrupted)
    assert placement_of(interrupted) == placement_of(whole)
    assert trainer_of(interrupted) | {"training_seconds": 0} == trainer_of(whole) | {"training_seconds": 0}
    ours, theirs = tensors_of(interrupted), tensors_of(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 4)])
def test_at_another_layout_experts_are_in_order_again(staying: Path, interrupted: Path, world: int, ep: int) -> None:
    succeed(world, "train", "--resume", interrupted, *layout(ep, 2), "placement=null")
    assert trainer_of(interrupted)["placements"] == {}
    torch.testing.assert_close(losses_of(interrupted), losses_of(staying), rtol=0, atol=1e-5)


def test_a_checkpoint_that_knows_of_no_placement_loads(staying: Path, interrupted: Path) -> None:
    """As they were written before there were any; experts are in order then."""
    directory = newest_checkpoint(interrupted)
    trainer = trainer_of(interrupted, SAVED)
    del trainer["placements"]
    (directory / "trainer.json").write_text(json.dumps(trainer))
    manifest = read_manifest(directory)
    files = manifest.files | {"trainer.json": digest_of(directory / "trainer.json")}
    shutil.move(directory, directory.with_name("altered"))
    publish(directory.with_name("altered"), directory, replace(manifest, files=files))
    succeed(2, "train", "--resume", interrupted, "placement=null")
    assert trainer_of(interrupted)["placements"] == {}
    torch.testing.assert_close(losses_of(interrupted), losses_of(staying), rtol=0, atol=1e-5)


def test_evaluate_finds_the_experts_of_a_run_that_moved_them(runs: Path) -> None:
    run = moving(runs, 2, 2, 2)
    test = json.loads((run / "summary.json").read_text())["test"]
    for world in (1, 2):
        again = json.loads(succeed(world, "evaluate", run, "--json")[0].out)["test"]
        assert again["loss"] == pytest.approx(test["loss"], abs=1e-6)


def test_nodes_of_one_rank_and_the_progress_line(config: Path, tmp_path: Path, staying: Path) -> None:
    """Co-activations are counted there; the run is the same."""
    several_nodes = [MOVING, "placement.ranks_per_node=1", "placement.slack=0.001"]
    first, second = succeed(2, "train", "--run-dir", tmp_path / "run", config, *layout(2, 1), *several_nodes)
    assert "placement after step 5: heaviest rank" in first.err
    assert "expert(s) moved" in first.err
    assert second.err == ""
    torch.testing.assert_close(losses_of(tmp_path / "run"), losses_of(staying), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("placement={ranks_per_node: 3}", ["placement.ranks_per_node=3", "expert_parallel_size=2", "allowed: 1, 2"]),
        ("placement={threshold: 0.5}", ["placement.threshold"]),
        ("placement={every: 3}", ["placement.every"]),
    ],
)
def test_a_wrong_section_is_refused(config: Path, tmp_path: Path, override: str, parts: list[str]) -> None:
    outcomes = dist_moe(2, "train", "--run-dir", tmp_path / "run", config, *layout(2, 1), override)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    for part in parts:
        assert part in outcomes[0].err


LOAD_LE = np.array([[30.0, 30.0, 10.0, 10.0]] * 5)
SCHEDULE = PlacementScheduleConfig(slack=0.0)
COSTS = MoveCosts(row_bytes=10, expert_bytes=4000, groups=1, steps_left=100)
IDENTITY = Placement.identity(4, 2)


def test_a_move_must_pay_within_the_horizon() -> None:
    """Two ranks with 60 and 20 rows; with 40 and 40, 20 rows of 10 bytes are saved a step, for one expert each."""
    placement, look = propose(SCHEDULE, LOAD_LE, IDENTITY, None, 2, COSTS)
    assert (look.before, look.after, look.bound) == (1.5, 1.0, 1.0)
    assert len(IDENTITY.moved_to(placement)) == 2
    for changed, pays in [
        (replace(COSTS, steps_left=20), True),
        (replace(COSTS, steps_left=19), False),
        (replace(COSTS, expert_bytes=20_000), True),
        (replace(COSTS, expert_bytes=20_001), False),
        (replace(COSTS, groups=6), False),
    ]:
        proposed, look = propose(SCHEDULE, LOAD_LE, IDENTITY, None, 2, changed)
        assert (proposed != IDENTITY) == pays, changed
        assert look.after == (1.0 if pays else 1.5)


def test_horizon_threshold_and_return_of_the_configuration() -> None:
    for section, moves in [
        ({"horizon_steps": 20}, True),
        ({"horizon_steps": 19}, False),
        ({"least_return": 5.0}, True),
        ({"least_return": 5.1}, False),
        ({"threshold": 1.49}, True),
        ({"threshold": 1.5}, False),
    ]:
        config = PlacementScheduleConfig(slack=0.0, **section)
        proposed, _ = propose(config, LOAD_LE, IDENTITY, None, 2, COSTS)
        assert (proposed != IDENTITY) == moves, section


def test_co_activations_are_tokens_that_want_both() -> None:
    weight_TE = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    pairs = union_of_routes([Route.from_dense(weight_TE)])
    assert co_activations(pairs).tolist() == [[2, 2, 1], [2, 3, 2], [1, 2, 3]]
    assert co_activations(pairs.renamed(torch.tensor([2, 0, 1]))).tolist() == [[3, 2, 2], [2, 3, 1], [2, 1, 2]]
