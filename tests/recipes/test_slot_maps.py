"""A run whose gates choose among more slots than there are experts: trained, resumed, searched, evaluated, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_moe.engine.checkpoint import place_weights, read_model, write_first_checkpoint
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config
from dist_moe.tasks import build_model
from tests.helpers.commands import succeed
from tests.helpers.runs import largest_difference, losses_of, records_of, summary_of, tensors_of, write_config

EXPERTS, SLOTS, STEPS = 4, 9, 12
TABLE = "moe.slot_map.table"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Trained with its experts on two ranks; its first checkpoint is half-way."""
    root = tmp_path_factory.mktemp("slots")
    model = {"num_slots": SLOTS, "gate": {"name": "top_k", "k": 3, "balance_weight": 0.1}}
    train = {"max_steps": STEPS, "checkpoint_every": STEPS // 2, "log_every": 1}
    config = write_config(root, tiny_data, model=model, train=train)
    succeed(2, "train", "--run-dir", root / "run", config, "parallel.expert_parallel_size=2")
    return root / "run"


def test_what_is_recorded_speaks_of_experts(run: Path) -> None:
    assert tensors_of(run)[f"{TABLE}|buffer"].tolist() == [[[slot % EXPERTS for slot in range(SLOTS)]]]
    for record in records_of(run):
        assert [len(load_E) for load_E in record["load"]] == [EXPERTS]
    test = summary_of(run)["test"]
    assert 1 <= test["active_experts"] <= 3, "of three slots, some lead to the same expert"
    assert test["dead_experts"] in range(EXPERTS)


def test_one_process_goes_on_the_same(run: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    succeed(1, "train", "--resume", resumed, "parallel.expert_parallel_size=1")
    torch.testing.assert_close(losses_of(resumed), losses_of(run), rtol=0, atol=1e-5)
    assert largest_difference(tensors_of(resumed), tensors_of(run)) < 1e-5


def test_a_searched_run_evaluates_and_is_exported(run: Path, tmp_path: Path) -> None:
    succeed(2, "search", run, "--output", tmp_path / "found", "examples=300")
    report = json.loads((tmp_path / "found" / "swap_search.json").read_text())
    table = tensors_of(tmp_path / "found")[f"{TABLE}|buffer"]
    assert report["swaps"]
    assert torch.bincount(table.flatten(), minlength=EXPERTS).tolist() == [3, 2, 2, 2]
    succeed(1, "export", tmp_path / "found", tmp_path / "weights.safetensors")
    exported = load_file(tmp_path / "weights.safetensors")
    assert exported[TABLE].equal(table)
    assert [len(exported[name]) for name in ("moe.gates.0.weight", "moe.experts.weight")] == [SLOTS, EXPERTS]
    for world, source in ((1, tmp_path / "weights.safetensors"), (2, tmp_path / "found")):
        evaluated = json.loads(succeed(world, "evaluate", source, "--json")[0].out)
        for name in ("loss", "auc", "active_experts"):
            assert evaluated["test"][name] == pytest.approx(report["test_after"][name], rel=1e-4), name
    succeed(1, "import", tmp_path / "weights.safetensors", tmp_path / "new")
    assert tensors_of(tmp_path / "new")[f"{TABLE}|buffer"].equal(table)


def masked_model(run: Path, allowed_E: list[bool]) -> MoEModel:
    config = load_config(run / "config.yaml")
    model = build_model(config, config.data.open(progress=False), SingleWorld())
    for gate in model.moe_layers["moe"].each_gate:
        gate.allow(torch.tensor(allowed_E))
    return model


def test_masks_are_saved_and_loaded(run: Path, tmp_path: Path) -> None:
    allowed_E = [slot % 3 == 1 for slot in range(SLOTS)]
    ours = masked_model(run, allowed_E)
    path = write_first_checkpoint(ours, tmp_path / "checkpoints", "a test")
    theirs = masked_model(run, [True] * SLOTS)
    place_weights(theirs, read_model(path))
    assert [gate.allowed_E.tolist() for gate in theirs.moe_layers["moe"].each_gate if gate.allowed_E is not None] == [
        allowed_E
    ] * 2
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with pytest.raises(UserError, match="allowed_E"):
        place_weights(theirs, read_model(newest_checkpoint(run)))
