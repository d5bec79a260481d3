"""dist-moe export and import: a model in one file, the same to the bit, and a run that starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.config.files import digest_of, write_json
from dist_moe.engine.checkpoint.files import checkpoints_of, newest_checkpoint, publish, read_manifest
from dist_moe.recipes.recipe import load_config
from tests.helpers.commands import run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, tensors_of, write_config

from .conftest import Refused

EXPERTS, STEPS = 4, 12
GATE = {"name": "top_k", "k": 2, "bias_update_rate": 0.01}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Trained with its experts on two ranks; the bias of its gate and the permutation are buffers."""
    root = tmp_path_factory.mktemp("exported")
    model = {"gate": GATE, "permutation": {"epochs": 0.25}}
    config = write_config(root, tiny_data, model=model, train={"max_steps": STEPS})
    succeed(2, "train", "--run-dir", root / "run", config, "parallel.expert_parallel_size=2")
    return root / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    succeed(1, "export", run, run.parent / "weights.safetensors")
    return run.parent / "weights.safetensors"


def test_what_the_file_holds(run: Path, exported: Path) -> None:
    tensors, checkpoint = load_file(exported), tensors_of(run)
    states = {tuple(key.split("|")[:2]) for key in checkpoint}
    assert tensors.keys() == {name for name, state in states if state in ("master", "buffer")}
    for name, tensor in tensors.items():
        if f"{name}|buffer" in checkpoint:
            assert tensor.equal(checkpoint[f"{name}|buffer"])
        elif f"{name}|master" in checkpoint:
            assert tensor.equal(checkpoint[f"{name}|master"])
        else:
            assert len(tensor) == EXPERTS
            for expert, of_expert in enumerate(tensor):
                assert of_expert.equal(checkpoint[f"{name}|master|{expert}"])
    with safe_open(exported, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["configuration"]) == load_config(run / "config.yaml").plain()
    assert metadata["step"] == str(STEPS)


@pytest.mark.parametrize("world", [1, 2])
def test_evaluate_takes_the_file(run: Path, exported: Path, world: int) -> None:
    ours, theirs = (json.loads(succeed(world, "evaluate", path, "--json")[0].out) for path in (exported, run))
    assert ours["checkpoint"] == exported.name
    assert ours["test"] == theirs["test"]


def test_evaluate_takes_a_checkpoint(run: Path) -> None:
    ours, theirs = (json.loads(succeed(1, "evaluate", path, "--json")[0].out) for path in (newest_checkpoint(run), run))
    assert ours == theirs


def test_there_and_back(run: Path, exported: Path, tmp_path: Path) -> None:
    (said,) = succeed(1, "import", exported, tmp_path / "new")
    assert "without optimizer state" in said.out
    imported = tensors_of(tmp_path / "new")
    kept = {key: tensor for key, tensor in tensors_of(run).items() if key.split("|")[1] in ("master", "buffer")}
    assert imported.keys() == kept.keys()
    assert [
        key for key in kept if not (imported[key].dtype == kept[key].dtype and imported[key].equal(kept[key]))
    ] == []
    succeed(1, "export", tmp_path / "new", tmp_path / "again.safetensors")
    first, again = load_file(exported), load_file(tmp_path / "again.safetensors")
    assert [name for name in first if not first[name].equal(again[name])] == []


def test_half_as_large(run: Path, exported: Path, tmp_path: Path) -> None:
    succeed(1, "export", run, tmp_path / "half.safetensors", "--dtype", "bf16")
    whole, half = load_file(exported), load_file(tmp_path / "half.safetensors")
    buffers = {key.split("|")[0] for key in tensors_of(run) if key.endswith("|buffer")}
    assert buffers
    for name, tensor in whole.items():
        wanted = tensor if name in buffers else tensor.bfloat16()
        assert half[name].dtype == wanted.dtype
        assert half[name].equal(wanted)


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 1), (2, 2)])
def test_a_run_starts_from_it(run: Path, exported: Path, tmp_path: Path, world: int, stage: int) -> None:
    """From the weights of the file, with the optimizer's step and moments at zero."""
    new = tmp_path / "new"
    succeed(1, "import", exported, new, "train.max_steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    layout = [f"parallel.expert_parallel_size={world}", f"deepspeed.zero_optimization.stage={stage}"]
    outcomes = succeed(world, "train", "--resume", new, *layout)
    assert "the optimizer begins without moments" in outcomes[0].err
    assert [record["step"] for record in records_of(new)] == [1, 2, 3]
    start, after = tensors_of_step(new, 0), tensors_of_step(new, 1)
    assert json.loads((checkpoints_of(new) / "step-00000001/trainer.json").read_text())["scalars"] == {"step": 1}
    moved = 0
    for key, master in start.items():
        name, state, *expert = key.split("|")
        if state == "master":
            suffix = "".join(f"|{e}" for e in expert)
            gradient = after[f"{name}|exp_avg{suffix}"] / 0.1
            torch.testing.assert_close(after[f"{name}|exp_avg_sq{suffix}"], 0.001 * gradient**2, rtol=1e-3, atol=1e-12)
            wanted = master - 0.005 * gradient / (gradient.abs() + 1e-7)  # Adam's first step
            torch.testing.assert_close(after[key], wanted, rtol=0, atol=2e-6)
            moved += not after[key].equal(master)
    assert moved > 10
    assert losses_of(new)[0] < losses_of(run)[0]


def tensors_of_step(run: Path, step: int) -> dict[str, Tensor]:
    files = (checkpoints_of(run) / f"step-{step:08d}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_moments_that_are_lost_are_not_taken_for_an_import(run: Path, exported: Path, tmp_path: Path) -> None:
    """Only a checkpoint that says so may be without them."""
    new = tmp_path / "new"
    succeed(1, "import", exported, new, "train.max_steps=3")
    directory = newest_checkpoint(new)
    trainer = json.loads((newest_checkpoint(run) / "trainer.json").read_text()) | {"step": 0, "schedule_steps": 0}
    write_json(directory / "trainer.json", trainer)
    manifest = read_manifest(directory)
    manifest.files["trainer.json"] = digest_of(directory / "trainer.json")
    shutil.move(directory, directory.with_name("moved"))
    publish(directory.with_name("moved"), directory, manifest)
    (outcome,) = on_ranks(1, run_here, ["train", "--resume", str(new), "parallel.expert_parallel_size=1"])
    assert outcome.code == 2
    assert "no optimizer state" in outcome.err


def test_refusals(refused: Refused, run: Path, exported: Path, tmp_path: Path) -> None:
    refused(["export", run, exported], f"{exported} exists already")
    refused(["export", exported, tmp_path / "x.safetensors"], "name a run directory or a checkpoint")
    refused(["export", tmp_path, tmp_path / "x.safetensors"], "not a run directory")
    refused(["export", run, tmp_path / "no" / "x.safetensors"], "cannot be written")
    refused(["import", exported, run], f"RUN_DIR {run} holds a run already")
    refused(["import", run / "config.yaml", tmp_path / "new"], "config.yaml is no file of 'dist-moe export'")
    refused(["import", exported, tmp_path / "new", "model.gate.k=99"], "model.gate.k=99")
    alone = shutil.copytree(newest_checkpoint(run), tmp_path / "alone" / "checkpoint")
    refused(["export", alone, tmp_path / "x.safetensors"], "outside of a run directory")
    altered = bytearray(exported.read_bytes())
    altered[-5] ^= 4
    (tmp_path / "altered.safetensors").write_bytes(altered)
    for command in (["evaluate"], ["import", tmp_path / "new"]):
        refused([command[0], tmp_path / "altered.safetensors", *command[1:]], "altered.safetensors is torn or altered")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_a_checkpoint_without_all_experts(refused: Refused, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("num_experts: 4", "num_experts: 8"))
    refused(["export", copy, tmp_path / "x.safetensors"], "4 experts of moe.experts.bias, not 8")
