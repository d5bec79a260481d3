"""A run that changes its layout again and again: masters and moments are kept to the bit, the losses to rounding."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint.files import checkpoints_of, newest_checkpoint, read_manifest
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.recipes.recipe import plan_resumed_run
from dist_moe.tasks import build_model
from tests.helpers.commands import succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, save_checkpoint, stage_overrides, tensors_of, write_config

Layout = tuple[int, int, int]
"""Ranks, expert-parallel size, ZeRO stage."""
CYCLE: list[Layout] = [(4, 4, 3), (2, 1, 1), (1, 1, 1), (4, 2, 2)]
"""Ranks 4 -> 2 -> 1 -> 4, EP 4 -> 1 -> 2, ZeRO 3 -> 1 -> 2; after the last stop it loads at the first again."""
EVERY = 5
LAST = EVERY * len(CYCLE)


def overrides(layout: Layout, steps: int) -> list[str]:
    _, ep, stage = layout
    return [f"parallel.expert_parallel_size={ep}", *stage_overrides(stage), f"train.max_steps={steps}"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    deepspeed = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": LAST}},
        "gradient_clipping": 0.3,
    }
    model = {"permutation": {"epochs": 0.15}}
    return write_config(tmp_path_factory.mktemp("cycle"), tiny_data, model=model, deepspeed=deepspeed)


def load_and_save(run: Path, target: Path, layout: Layout) -> None:
    """What ``layout`` has after loading the newest checkpoint of ``run``, as a checkpoint under ``target``."""
    plan = plan_resumed_run(run, overrides(layout, LAST))
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        engine = ExpertParallelEngine(build_model(plan.config, plan.task, groups.world), plan.deepspeed, groups)
        assert plan.checkpoint is not None
        step = load_checkpoint(engine, plan.checkpoint).step
        save_checkpoint(engine, checkpoints_of(target), step, keep=1)
        engine.destroy()


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not one[key].equal(other[key])]


def test_a_run_through_all_layouts(config: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    succeed(1, "train", "--run-dir", straight, config, *overrides((1, 1, 0), LAST))
    for index, layout in enumerate(CYCLE):
        start = ["--run-dir", run, config] if index == 0 else ["--resume", run]
        succeed(layout[0], "train", *start, *overrides(layout, EVERY * (index + 1)))
        written = read_manifest(newest_checkpoint(run)).layout
        assert written is not None
        assert astuple(written) == layout
        here = tensors_of(run)
        assert {key.split("|")[1] for key in here} == {"master", "exp_avg", "exp_avg_sq", "buffer"}
        following = CYCLE[(index + 1) % len(CYCLE)]
        on_ranks(following[0], load_and_save, run, tmp_path / f"loaded-{index}", following)
        assert different(tensors_of(tmp_path / f"loaded-{index}"), here) == []
        shutil.rmtree(tmp_path / f"loaded-{index}")
    assert [record["step"] for record in records_of(run)] == list(range(1, LAST + 1))
    torch.testing.assert_close(losses_of(run), losses_of(straight), rtol=0, atol=1e-5)
