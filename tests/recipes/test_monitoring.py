"""What a run shows: metrics.jsonl, TensorBoard, progress lines and files; and that the metrics are true."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from dist_moe.data.movielens import PairBatch
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.models import Recommender
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.search import PermutationSearch
from dist_moe.tasks import build_model
from tests.helpers.board import last_image, read_board
from tests.helpers.commands import Outcome, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, write_config

STEPS, EXPERTS, BATCH, DIM, UNITS = 100, 4, 64, 16, 16
WEIGHTS = (0.3, 0.9)
EP2 = "parallel.expert_parallel_size=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Trees that harden within a hundred steps."""
    return write_config(
        tmp_path_factory.mktemp("config"),
        tiny_data,
        model={
            "gate": {"name": "comet", "k": 1, "gamma": 0.1, "entropy_weight": 2.0},
            "permutation": {"epochs": 0.1},
        },
        train={"max_steps": STEPS, "validate_every": 40, "log_every": 7},
        target_weights=list(WEIGHTS),
    )


@pytest.fixture(scope="module")
def shown(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The run directory and what the two ranks printed."""
    run = tmp_path_factory.mktemp("shown") / "run"
    return run, succeed(2, "train", "--run-dir", run, config, EP2)


@pytest.fixture(scope="module")
def run(shown: tuple[Path, list[Outcome]]) -> Path:
    return shown[0]


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    return records_of(run)


@pytest.fixture(scope="module")
def board(run: Path) -> EventAccumulator:
    return read_board(run)


def scalars(board: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in board.Scalars(tag)}


def test_one_record_per_step(records: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        numbers = [value for name, value in record.items() if name != "load"]
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
        assert np.shape(record["load"]) == (1, EXPERTS)
        weighted = WEIGHTS[0] * record["bce"] + WEIGHTS[1] * record["mse"]
        assert record["loss"] == pytest.approx(weighted, rel=1e-6)
        auxiliary = record["entropy"] + record["permutation"]
        assert record["total_loss"] == pytest.approx(record["loss"] + auxiliary, abs=1e-5)
        assert record["examples_per_second"] > 0


def test_rows_and_bytes_are_consistent(records: list[dict[str, Any]]) -> None:
    for record in records:
        rows = record["rows_computed"]
        assert sum(record["load"][0]) == rows
        assignments = record["active_experts"] * 2 * BATCH
        assert assignments / 2 <= rows + 1e-6 <= min(assignments, BATCH * EXPERTS) + 2e-6
        there_and_back, forward_and_backward = 2, 2
        assert record["wire_rows"] % (there_and_back * forward_and_backward) == 0
        assert record["wire_rows"] <= there_and_back * forward_and_backward * rows
        assert record["wire_bytes"] == record["wire_rows"] / 2 * (DIM + UNITS) * 4


def test_traffic_falls_as_trees_harden(records: list[dict[str, Any]]) -> None:
    first, last = records[0], records[-1]
    assert first["active_experts"] == EXPERTS
    assert first["rows_computed"] == BATCH * EXPERTS
    assert first["wire_rows"] == 4 * BATCH * EXPERTS // 2
    assert last["active_experts"] < 1.5
    for key in ("rows_computed", "wire_rows", "wire_bytes"):
        assert last[key] < 0.75 * first[key], key


def first_batch(config: Path, run: Path) -> dict[str, Any]:
    """Loss and load of the first step by a loop over its pairs, in fp64, from the untrained model."""
    plan = plan_new_run(config, [], run)
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model = build_model(plan.config, plan.task, groups.world)
        (batch,) = plan.feed.micro_batches(0)
        model.tables["moe"].begin_step()
        with torch.no_grad():
            output = model(batch.user_B, batch.item_B)
            assert isinstance(model, Recommender)
            pairs = naive_pairs(model, batch)
        bce, squares = [], []
        for logit, stars, target in zip(*output.predictions, batch.rating_B, strict=True):
            probability = 1 / (1 + math.exp(-float(logit)))
            bce.append(-math.log(probability if target > 0 else 1 - probability))
            if target > 0:
                squares.append((float(stars) - float(target)) ** 2)
        return {"bce": np.mean(bce), "mse": np.mean(squares), "load": [pairs.sum(0).tolist()]}


def naive_pairs(model: Recommender, batch: PairBatch) -> Tensor:
    """(B, E): whether a gate, mixed by the permutation of the first step, has weight for the expert."""
    x_BD = torch.cat([model.user_embedding(batch.user_B), model.item_embedding(batch.item_B)], dim=1)
    assert isinstance(model.tables["moe"], PermutationSearch)
    soft = model.tables["moe"].soft_matrix()[0, 0]
    weights = [gate(x_BD).dense() @ soft for gate in model.moe.gates]
    return (weights[0] > 0) | (weights[1] > 0)


def test_first_step_by_hand(config: Path, run: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    (by_hand,) = on_ranks(1, first_batch, config, tmp_path / "unused")
    for name in ("bce", "mse"):
        assert records[0][name] == pytest.approx(by_hand[name], rel=1e-5)
    assert records[0]["load"] == by_hand["load"]


@pytest.mark.parametrize(
    ("tag", "key"),
    [
        ("loss/task", "loss"),
        ("loss/total", "total_loss"),
        ("loss/bce", "bce"),
        ("loss/mse", "mse"),
        ("loss/entropy", "entropy"),
        ("loss/permutation", "permutation"),
        ("experts/per_token_mean", "active_experts"),
        ("experts/per_token_p90", "active_experts_p90"),
        ("experts/effective_mean", "effective_experts"),
        ("experts/dead", "dead_experts"),
        ("experts/load_cv", "load_cv"),
        ("experts/rows_computed", "rows_computed"),
        ("traffic/all_to_all_bytes", "wire_bytes"),
        ("traffic/all_to_all_rows", "wire_rows"),
        ("traffic/bytes_across_nodes", "wire_bytes_across_nodes"),
        ("traffic/rows_across_nodes", "wire_rows_across_nodes"),
        ("speed/examples_per_second", "examples_per_second"),
        ("speed/tokens_per_second", "tokens_per_second"),
        ("time/step", "step_seconds"),
        ("time/data", "data_seconds"),
        ("optimizer/lr", "lr"),
        ("optimizer/grad_norm", "grad_norm"),
    ],
)
def test_tensorboard_shows_every_step(
    board: EventAccumulator, records: list[dict[str, Any]], tag: str, key: str
) -> None:
    values = scalars(board, tag)
    assert list(values) == list(range(1, STEPS + 1))
    for record in records:
        assert values[record["step"]] == pytest.approx(record[key], rel=1e-6)


def test_every_tenth_step_shows_where_its_layer_spent_its_time(
    board: EventAccumulator, records: list[dict[str, Any]]
) -> None:
    timed = range(10, STEPS + 1, 10)
    for phase in ("gate", "dispatch", "experts", "combine"):
        assert [record["step"] for record in records if f"{phase}_seconds" in record] == list(timed)
        shown = scalars(board, f"time/{phase}")
        assert shown == {step: pytest.approx(records[step - 1][f"{phase}_seconds"], rel=1e-6) for step in timed}
    all_steps = sum(BATCH / record["examples_per_second"] for record in records)
    for step in timed:  # on a busy machine a step may last much longer than its neighbours
        record = records[step - 1]
        inside = sum(record[f"{phase}_seconds"] for phase in ("gate", "dispatch", "experts", "combine"))
        assert 0 < inside < all_steps


def test_tensorboard_shows_evaluations(board: EventAccumulator, run: Path) -> None:
    for metric in ("auc", "bce", "mse", "loss", "active_experts", "effective_experts", "dead_experts"):
        assert list(scalars(board, f"validation/{metric}")) == [40, 80]
    test = json.loads((run / "summary.json").read_text())["test"]
    for metric in ("auc", "bce", "mse", "loss", "active_experts", "effective_experts", "dead_experts"):
        assert scalars(board, f"test/{metric}") == {STEPS: pytest.approx(test[metric], rel=1e-6)}


def test_pictures_of_load_tables_and_placement_stand_at_the_end(
    board: EventAccumulator, records: list[dict[str, Any]]
) -> None:
    """The data behind the axes: shares of each expert, seven steps a column; see tests/engine/test_board.py."""
    columns = {event.step: make_ndarray(event.tensor_proto) for event in board.Tensors("experts/load_share")}
    assert list(columns) == [*range(7, STEPS, 7), STEPS]
    for last, column_LE in columns.items():
        load_WE = np.array([record["load"][0] for record in records[last - 7 : last]])
        if last < STEPS:
            expected_E = (load_WE / load_WE.sum(axis=1, keepdims=True)).mean(axis=0)
            np.testing.assert_allclose(column_LE[0], expected_E, atol=1e-3)
    for tag in ("experts/load", "experts/load_over_time", "permutation/slot_to_expert", "placement/rank_of_expert"):
        image = last_image(board, tag)
        assert 0 <= image.min() < image.max() <= 255
    steps = {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}
    assert steps["experts/load"][-1] == steps["permutation/slot_to_expert"][-1] == STEPS
    assert steps["placement/rank_of_expert"] == [0]
    assert records[-1]["rows_changed"] in {0, 2, 3, 4}


def test_gates_that_collapse_raise_an_alarm_on_screen_and_as_text(
    shown: tuple[Path, list[Outcome]], board: EventAccumulator, records: list[dict[str, Any]]
) -> None:
    """These trees harden so fast that each gate sends every token to one expert."""
    active = [record["active_experts"] for record in records]
    onset = next(step for step in range(1, STEPS) if max(active[step:]) == 1)
    (event,) = board.Tensors("alarm/text_summary")
    sentence = event.tensor_proto.string_val[0].decode()
    assert onset <= event.step <= onset + 50
    assert "collapse: MoE layer 0" in sentence
    assert shown[1][0].err.count(sentence) == 1


def test_configuration_and_command_are_texts_and_the_run_has_its_directory_s_name(
    board: EventAccumulator, run: Path
) -> None:
    (text,) = (event.tensor_proto.string_val[0].decode() for event in board.Tensors("configuration/text_summary"))
    assert yaml.safe_load(text.removeprefix("```yaml").removesuffix("```")) == yaml.safe_load(
        (run / "config.yaml").read_text()
    )
    (command,) = (event.tensor_proto.string_val[0].decode() for event in board.Tensors("command/text_summary"))
    recorded = json.loads((run / "environment.json").read_text())["command"]
    assert shlex.split(command.strip("`")) == recorded
    content = board.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    chosen = parse_session_start_info_plugin_data(content).hparams
    assert chosen["model.gate.name"].string_value == "comet"
    assert chosen["parallel.expert_parallel_size"].number_value == 2
    assert "model.gate.max_active" not in chosen, "as by default"
    assert [path.parent for path in run.glob("**/events.out.tfevents.*")] == [run]


def test_only_rank_0_speaks(shown: tuple[Path, list[Outcome]]) -> None:
    _, (first, second) = shown
    assert (second.out, second.err) == ("", "")
    assert f"step {STEPS}/{STEPS}: loss" in first.err
    for part in ("examples/s", "experts/token", "B exchanged", "left", "validation after step 40", "auc"):
        assert part in first.err


def test_the_table_at_the_end(shown: tuple[Path, list[Outcome]]) -> None:
    run, (first, _) = shown
    summary = json.loads((run / "summary.json").read_text())
    for row, metrics in {"this model": summary["test"], **summary["baselines"]}.items():
        (line,) = [line for line in first.out.splitlines() if line.startswith(row)]
        for metric in ("auc", "bce", "mse", "loss"):
            assert f"{metrics[metric]:.4f}" in line
    assert str(run) in first.out


def test_files_of_a_run(run: Path) -> None:
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["parallel"]["expert_parallel_size"] == 2
    assert resolved["train"]["keep_checkpoints"] >= 1
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])


def test_loss_is_that_of_the_global_batch_at_any_layout(
    config: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    for world, ep in ((1, 1), (2, 1)):
        run = tmp_path / f"{world}-{ep}"
        short = ["train.max_steps=3", f"parallel.expert_parallel_size={ep}"]
        succeed(world, "train", "--run-dir", run, config, *short)
        for ours, theirs in zip(records_of(run), records, strict=False):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["load"] == theirs["load"]
            assert ours["rows_computed"] == theirs["rows_computed"]
            assert (ours["wire_rows"], ours["wire_bytes"]) == (0, 0)
