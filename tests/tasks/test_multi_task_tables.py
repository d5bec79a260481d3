"""Tables as a task: losses against a loop, diagnoses against a loop, and training through the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_moe.data.tables import RowTable, TableColumns, Target
from dist_moe.data.tables.prepare import PreparedTable
from dist_moe.models import ModelOutput
from dist_moe.models.multi_task import HomeConfig
from dist_moe.models.multi_task.levels import SHARED
from dist_moe.recipes.supervised.evaluate import trained_run
from dist_moe.tasks.evaluation import evaluate
from dist_moe.tasks.multi_task_tables import MultiTaskTablesTask
from tests.helpers.board import read_board
from tests.helpers.commands import succeed
from tests.helpers.runs import losses_of, summary_of, validations_of
from tests.helpers.tables import MODELS, table_config

TARGETS = (Target("click", "binary"), Target("stars", "numeric"))


def made_task(rows: int = 12) -> MultiTaskTablesTask:
    rng = np.random.default_rng(0)
    label_NT = np.stack([rng.integers(0, 2, rows), rng.normal(size=rows)], axis=1).astype(np.float32)
    label_NT[rng.random(label_NT.shape) < 0.4] = math.nan
    part = RowTable(
        rng.integers(0, 3, (rows, 2)).astype(np.int32),
        rng.normal(size=(rows, 1)).astype(np.float32),
        np.full((rows, 0), -1, np.int32),
        label_NT,
        rng.random(rows).astype(np.float32) + 0.5,
        np.full(rows, -1),
    )
    columns = TableColumns(("a", "b"), (4, 5), ("x",), (("tags", 7, 2),))
    return MultiTaskTablesTask(PreparedTable(part, part, part, columns, {}, {}), TARGETS)


def naive_losses(task: MultiTaskTablesTask, predicted_TN: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all rows as one step: a row after the other, in fp64."""
    losses = []
    for target, predicted_N, label_N in zip(TARGETS, predicted_TN, task.train.target_NT.T, strict=True):
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for predicted, label, w in zip(predicted_N, label_N.tolist(), task.train.weight_N.tolist(), strict=True):
            if not math.isnan(label):
                p = torch.sigmoid(predicted)
                surprise = -torch.log(p if label else 1 - p)
                total = total + w * (surprise if target.kind == "binary" else (predicted - label) ** 2)
                weight += w
        losses.append(total / weight)
    return dict(zip(("log_loss_click", "mse_stars"), losses, strict=True))


@pytest.mark.parametrize("shares", [1, 3])
def test_losses_and_gradients_are_those_of_a_loop_however_a_step_is_shared_out(shares: int) -> None:
    task, rows = made_task(), np.arange(12)
    predicted_TN = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours_TN, theirs_TN = (predicted_TN.clone().requires_grad_() for _ in range(2))
    unlabelled_TN = torch.from_numpy(np.isnan(task.train.target_NT.T.copy()))
    wild_TN = torch.where(unlabelled_TN, math.nan, ours_TN)  # whatever is predicted there
    losses = dict.fromkeys(("log_loss_click", "mse_stars"), torch.zeros((), dtype=torch.float64))
    for index_B in np.array_split(rows, shares):
        output = ModelOutput(tuple(wild_TN[:, index_B].unbind()), ())
        for name, loss in task.task_losses(output, task.train.batch(index_B, rows)).items():
            losses[name] = losses[name] + loss
    naive = naive_losses(task, theirs_TN)
    assert losses.keys() == naive.keys()
    for name, loss in naive.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-6, atol=0)
    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(naive.values())).sum().backward()
    torch.testing.assert_close(ours_TN.grad, theirs_TN.grad, rtol=1e-6, atol=1e-9)
    assert (ours_TN.grad[unlabelled_TN] == 0).all()


def test_a_step_without_labels_has_no_loss() -> None:
    task = made_task()
    batch = task.train.batch(np.arange(3), np.arange(3))
    bare = replace(batch, target_BT=torch.full((3, 2), math.nan), weight_in_step_T=(0.0, 0.0))
    predicted = torch.ones(2, 3, requires_grad=True)
    losses = task.task_losses(ModelOutput(tuple(predicted), ()), bare)
    sum(losses.values(), torch.zeros(())).backward()
    assert [float(loss.detach()) for loss in losses.values()] == [0.0, 0.0]
    assert (predicted.grad == 0).all()


def test_what_a_model_is_built_with_and_gates_can_route_by() -> None:
    task = made_task()
    inputs = task.model_inputs()
    assert (inputs["features"].sizes, inputs["features"].numeric, inputs["features"].lists) == ((4, 5), 1, ((7, 2),))
    assert inputs["targets"] == ("click", "stars")
    ids = task.id_counts()
    assert ids is not None
    assert ids.tolist() == [int((task.train.ids_NC[:, 0] == i).sum()) for i in range(4)]


def numbers_in(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Those that do not jump, as bins of a calibration do, and expected errors over these."""
    if isinstance(found, dict):
        for key, inner in found.items():
            yield from numbers_in(inner, f"{name}/{key}")
    elif isinstance(found, float) and "ece" not in name:
        yield name, found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Every model on the same table, on one and on two ranks."""
    root = tmp_path_factory.mktemp("tables")
    found = {}
    for model in MODELS:
        config = table_config(root, model)
        for ranks in (1, 2):
            found[model, ranks] = root / f"{model}-{ranks}"
            split = ["parallel.expert_parallel_size=2", "parallel.overlap_chunks=2"]
            split = split if ranks == 2 and model != "shared_bottom" else []
            succeed(ranks, "train", config, "--run-dir", found[model, ranks], *split)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_and_ranks_change_nothing(runs: dict[tuple[str, int], Path], model: str) -> None:
    one, two = (summary_of(runs[model, ranks]) for ranks in (1, 2))
    test, constant = one["test"], one["baselines"]["constant"]
    for name in ("log_loss_click", "log_loss_like", "mse_stars", "loss", "ne"):
        assert test[name] < 0.9 * constant[name], name
    for name in ("auc_click", "gauc_click", "auc_like", "auc"):
        assert test[name] > 0.7 > constant[name], name
    torch.testing.assert_close(losses_of(runs[model, 2]), losses_of(runs[model, 1]), rtol=1e-4, atol=1e-5)
    ours, theirs = (dict(numbers_in(found["test"])) for found in (one, two))
    assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


def test_the_line_about_an_evaluation_has_means_and_loss_alone(tmp_path: Path) -> None:
    config = table_config(tmp_path, "mmoe")
    (outcome,) = succeed(
        1, "train", config, "--run-dir", tmp_path / "run", "train.max_steps=2", "train.validate_every=1"
    )
    for when in ("validation after step 1: ", "test after step 2: "):
        (line,) = (line for line in outcome.err.splitlines() if line.startswith(when))
        named = [number.split()[0] for number in line.partition(": ")[2].split(", ")]
        assert named == ["auc", "gauc", "log_loss", "ne", "mse", "loss"]
    assert {"auc_click", "ece_like", "mse_stars"} < summary_of(tmp_path / "run")["test"].keys()


@pytest.mark.parametrize("model", ["mmoe", "home"])
def test_diagnoses_are_those_of_a_loop(runs: dict[tuple[str, int], Path], model: str) -> None:
    inputs: dict[str, torch.Tensor] = {}
    with trained_run(runs[model, 1]) as run, torch.no_grad():
        task, weights, layers = run.task, run.config.target_weights, run.model.moe_layers
        found = evaluate(task, run.model, task.test, weights, run.groups)
        assert not any(layer.experts._forward_hooks for layer in layers.values())  # nothing is left on the model
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, arguments, name=name: inputs.update({name: arguments[0]}))
        rows = np.arange(len(task.test))
        run.model.eval()(*task.test.batch(rows, rows).inputs)
        captured, own = [], []
        for name, layer in layers.items():
            of, x_TD, bank = found["experts"][name], inputs[name], layer.experts
            shape = getattr(layer.gates[0], "shape", None)
            for expert, (called, std) in enumerate(of["std"].items()):
                stream = shape.stream_of_expert[expert] if shape else 0
                counts = [len(rows) if e == expert else 0 for e in range(bank.num_experts)]
                y = bank(x_TD.view(-1, len(rows), bank.dim)[stream], counts).double().numpy()
                assert std == pytest.approx(y.std(), rel=1e-4)
                assert of["mean"][called] == pytest.approx(y.mean(), rel=1e-4)
                assert of["zero_share"][called] == pytest.approx((y == 0).mean())
            for gate, weight in zip(layer.gates, of["gate_weight"].values(), strict=True):
                expected_E = gate(x_TD, None).dense().double().sum(dim=0) / len(rows)
                np.testing.assert_allclose(list(weight.values()), expected_E, rtol=1e-5, atol=1e-9)
            of_gates = {gate: weight for gate, weight in of["gate_weight"].items() if gate != SHARED}
            for expert in of["std"]:
                if expert.startswith(f"{SHARED}_"):
                    share = [weight[expert] for weight in of_gates.values()]
                    captured.append(max(share) / sum(share))
            for gate, weight in of_gates.items():
                of_own = [w for expert, w in weight.items() if expert.startswith(f"{gate}_")]
                own += [sum(of_own) / sum(weight.values())] if of_own else []
    every = list(found["experts"].values())
    assert found["captured"] == pytest.approx(max(captured))
    assert found.get("own_share") == pytest.approx(min(own) if own else None)
    assert found["dead_activations"] == max(max(of["zero_share"].values()) for of in every)
    assert found["scale_ratio"] == pytest.approx(max(max(of["std"].values()) / min(of["std"].values()) for of in every))


def test_no_owner_is_taken_for_another() -> None:
    """A group may be called as one of its targets is, and a target "shared"."""
    config = HomeConfig(groups={"buy": ("buy",), "shared": ("shared", "like")}, self_gate=False)
    for shape, owners in zip(config.shapes(("buy", "shared", "like")), (3, 6), strict=True):
        assert len(set(shape.owner_of_expert)) == owners
        assert len({output.name for output in shape.outputs}) == 3


@pytest.mark.parametrize("model", MODELS)
def test_pictures_and_numbers_are_left_behind(runs: dict[tuple[str, int], Path], model: str) -> None:
    run, has_experts = runs[model, 2], model != "shared_bottom"
    for name in ("calibration.png", *(["experts.png"] if has_experts else [])):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors() or []) > 20
    assert (run / "experts.png").exists() == has_experts
    test, validation = summary_of(run)["test"], validations_of(run).popitem()[1]
    for found in (test, validation):
        assert bool(found["experts"]) == has_experts
        for of in found["experts"].values():
            assert {"zero_share", "mean", "std", "gate_weight"} == of.keys()
        assert found["calibration_bins"].keys() == {"click", "like"}
    if has_experts:
        tags = set(read_board(run).Tags()["scalars"])
        assert {"validation/dead_activations", "validation/captured"} <= tags
        assert ("own_share" in test) == (model != "mmoe")
