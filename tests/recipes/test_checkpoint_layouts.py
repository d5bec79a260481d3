"""A checkpoint written at one (world, EP, ZeRO stage) is the same at any other, and the run goes on the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.config.files import digest_of
from dist_moe.engine.checkpoint.files import (
    checkpoints_of,
    complete_directories,
    newest_checkpoint,
    step_directory,
    verify_checkpoint,
)
from dist_moe.engine.checkpoint.format import expert_ids_by_parameter
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.recipes.recipe import load_config, plan_resumed_run
from dist_moe.tasks import build_model
from tests.helpers.commands import Outcome, dist_moe, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import (
    largest_difference,
    losses_of,
    records_of,
    save_checkpoint,
    stage_overrides,
    tensors_of,
    write_config,
)

Layout = tuple[int, int, int]
WRITTEN: Layout = (2, 2, 1)
OTHERS: list[Layout] = [(1, 1, 0), (2, 2, 3), (2, 1, 2), (4, 2, 3), (4, 2, 1), (1, 1, 3), (2, 2, 2), (1, 1, 1)]
SAVED_AT, LAST = 10, 30
EXPERTS, EXPERT_PARAMETERS = 4, 2


def overrides(layout: Layout) -> list[str]:
    _, ep, stage = layout
    return [f"parallel.expert_parallel_size={ep}", *stage_overrides(stage)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """30 steps at WRITTEN; the learning rate warms up, and the permutation stage ends, after the checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    deepspeed: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "gradient_clipping": 0.3,
    }
    train = {"max_steps": LAST, "checkpoint_every": SAVED_AT, "keep_checkpoints": 9}
    config = write_config(root, tiny_data, model={"permutation": {"epochs": 0.25}}, train=train, deepspeed=deepspeed)
    succeed(WRITTEN[0], "train", "--run-dir", root / "run", config, *overrides(WRITTEN))
    return root / "run"


@pytest.fixture
def interrupted(uninterrupted: Path, tmp_path: Path) -> Path:
    """The same run as if it had died after its first checkpoint."""
    run = tmp_path / "interrupted"
    shutil.copytree(uninterrupted, run)
    for directory in complete_directories(checkpoints_of(run))[1:]:
        shutil.rmtree(directory)
    return run


def test_what_a_checkpoint_holds(uninterrupted: Path) -> None:
    directory = step_directory(checkpoints_of(uninterrupted), SAVED_AT)
    manifest = verify_checkpoint(directory)
    assert manifest.step == SAVED_AT
    assert manifest.files.keys() == {path.name for path in directory.iterdir()} - {"manifest.json"}
    for name, digest in manifest.files.items():
        assert digest_of(directory / name) == digest
    tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    for state in ("master", "exp_avg", "exp_avg_sq"):
        experts = {tuple(name.split("|")[::2]) for name in tensors if f"|{state}|" in name}
        assert {expert for _, expert in experts} == {str(e) for e in range(EXPERTS)}
        assert len(experts) == EXPERTS * EXPERT_PARAMETERS
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if not name.endswith("|buffer"))
    assert all(tensor.any() for name, tensor in tensors.items() if "|exp_avg" in name)
    assert {name for name in tensors if name.endswith("|buffer")} == {
        f"moe.slot_map.{name}|buffer" for name in ("step", "soft", "start", "table")
    }
    assert tensors["moe.slot_map.step|buffer"] == SAVED_AT
    trainer = json.loads((directory / "trainer.json").read_text())
    assert (trainer["step"], trainer["scalars"]) == (SAVED_AT, {"step": SAVED_AT})


def reload(source: Path, overrides: list[str], target: Path) -> list[str]:
    """Load the checkpoint of ``source``, write it again to ``target``; parameters that are not as they were."""
    plan = plan_resumed_run(source, overrides)
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model = build_model(plan.config, plan.task, groups.world)
        engine = ExpertParallelEngine(model, plan.deepspeed, groups)
        assert plan.checkpoint is not None
        step = load_checkpoint(engine, plan.checkpoint).step
        save_checkpoint(engine, checkpoints_of(target), step, keep=1)
        wrong = list(_wrong_parameters(engine, tensors_of(source)))
        engine.destroy()
        return wrong


def _wrong_parameters(engine: ExpertParallelEngine, expected: dict[str, Tensor]) -> Iterator[str]:
    for name, parameter, expert_ids in expert_ids_by_parameter(engine.module):
        if expert_ids is None:
            wanted = expected[f"{name}|master"]
        else:
            wanted = torch.stack([expected[f"{name}|master|{expert}"] for expert in expert_ids])
        with import_deepspeed().zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.detach(), wanted):
                yield name


def assert_same_checkpoint(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert trainer_of(one) == trainer_of(other)


def trainer_of(run: Path) -> dict[str, Any]:
    content = json.loads((newest_checkpoint(run) / "trainer.json").read_text())
    left_out = ("training_seconds", "callbacks")  # an engine by itself has no callbacks
    return {name: value for name, value in content.items() if name not in left_out}


def test_there_and_back_again(interrupted: Path, tmp_path: Path) -> None:
    source = interrupted
    for index, layout in enumerate([*OTHERS, WRITTEN]):
        target = tmp_path / str(index)
        target.mkdir()
        wrong = on_ranks(layout[0], reload, source, overrides(layout), target)
        assert wrong == [[]] * layout[0]
        shutil.copy(source / "config.yaml", target)
        assert_same_checkpoint(interrupted, target)
        source = target


@pytest.mark.parametrize("layout", [WRITTEN, *OTHERS], ids=str)
def test_the_run_goes_on_the_same(uninterrupted: Path, interrupted: Path, layout: Layout) -> None:
    succeed(layout[0], "train", "--resume", interrupted, *overrides(layout))
    assert [record["step"] for record in records_of(interrupted)] == list(range(1, LAST + 1))
    torch.testing.assert_close(losses_of(interrupted), losses_of(uninterrupted), rtol=0, atol=1e-5)
    for key in ("lr", "active_experts", "load"):
        now, before = ([record[key] for record in records_of(run)] for run in (interrupted, uninterrupted))
        assert now == before, key
    assert largest_difference(tensors_of(interrupted), tensors_of(uninterrupted)) < 1e-5


def test_ranks_agree_where_only_one_has_seen_the_damage(uninterrupted: Path, tmp_path: Path) -> None:
    """One bit of the newest checkpoint: the first rank of the node reads every byte, and decides for all."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    newest = newest_checkpoint(run)
    file = newest / "experts-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    first, _ = succeed(WRITTEN[0], "train", "--resume", run, *overrides(WRITTEN))
    assert f"{file} is torn or altered" in first.err
    assert losses_of(run).tolist() == losses_of(uninterrupted).tolist()
    assert largest_difference(tensors_of(run), tensors_of(uninterrupted)) == 0
    assert (newest.with_name(f"{newest.name}.damaged") / file.name).read_bytes() == content


def test_old_checkpoints_go(interrupted: Path) -> None:
    succeed(1, "train", "--resume", interrupted, *overrides((1, 1, 1)), "train.keep_checkpoints=1")
    assert [path.name for path in checkpoints_of(interrupted).iterdir()] == [f"step-{LAST:08d}"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.experts.units=8", ["moe.experts.weight|", "(16, 16)", "(16, 8)"]),
        ("model.num_experts=8", ["moe."]),
        ("model.gate={name: top_k}", ["moe.gates.0.weight"]),
        ("model.embedding_dim=4", ["moe.gates.0.split_weight|", "(2, 3, 16)", "(2, 3, 8)"]),
    ],
)
def test_a_checkpoint_of_another_model(interrupted: Path, change: str, parts: list[str]) -> None:
    """The run's configuration was altered by hand; --resume itself refuses such an override."""
    config = interrupted / "config.yaml"
    config.write_text(yaml.safe_dump(load_config(config, [change]).plain()))
    outcomes: list[Outcome] = dist_moe(2, "train", "--resume", interrupted, *overrides(WRITTEN))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    for part in [str(newest_checkpoint(interrupted)), "configuration", *parts]:
        assert part in outcomes[0].err
