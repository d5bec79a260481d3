"""Small training runs through the library's own entry points, and what they left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.config.files import parse_json
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.checkpoint.format import TrainingHistory
from dist_moe.engine.checkpoint.saver import CheckpointSaver
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.engine.launch.signals import StopRequest
from dist_moe.recipes.recipe import plan_new_run
from tests.helpers.board import read_board, steps_of

TINY_RUN: dict[str, Any] = {
    "model": {
        "embedding_dim": 8,
        "num_experts": 4,
        "experts": {"units": 16, "dropout": 0.0},
        "tower_units": 16,
        "gate": {"name": "comet", "k": 2, "gamma": 1.0, "entropy_weight": 0.05},
    },
    "train": {"epochs": 100, "max_steps": 50, "batch_size": 64, "log_every": 10, "checkpoint_every": 1000},
    "deepspeed": {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "eps": 1e-7, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 1},
    },
}


def write_config(directory: Path, tiny_data: dict[str, str], **sections: Any) -> Path:
    """A YAML file with TINY_RUN on the tiny data, sections replaced or merged one level deep."""
    return write_yaml(directory, TINY_RUN | {"data": tiny_data}, sections)


def write_yaml(directory: Path, base: dict[str, Any], sections: dict[str, Any]) -> Path:
    """A YAML file with ``base``, into which sections are merged one level deep; what is no section replaces."""
    content = dict(base)
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def save_checkpoint(engine: ExpertParallelEngine, root: Path, step: int, keep: int) -> None:
    """Write ``root/step-...``, here and now. Collective over all ranks."""
    root.parent.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(engine, in_background=False, failures_allowed=0, say=print)
    saver.save(root, step, keep, TrainingHistory())


def content_of(run: Path) -> dict[str, bytes]:
    """Every file of a run, by its path in it."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def stage_overrides(stage: int) -> list[str]:
    """A ZeRO stage; at stage 3 all parameters are sharded, also those that are small enough to be kept whole."""
    sharding = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
    return [f"deepspeed.zero_optimization.stage={stage}", *sharding]


def train_all(config: Path, run_dirs: dict[str, list[str]]) -> None:
    """Train one run per entry (directory -> overrides), all in the same process groups."""
    plans = [plan_new_run(config, overrides, Path(run_dir)) for run_dir, overrides in run_dirs.items()]
    with process_groups(plans[0].start.environment, plans[0].config.parallel) as groups:
        for plan in plans:
            run, environment = plan.start.run, plan.start.environment
            run.create()
            if environment.is_rank_zero:
                run.describe(plan.config.plain(), environment)
            recipe = plan.config.recipe
            assert not recipe.train_in_groups(plan, groups, StopRequest()).fit.interrupted


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """One per step."""
    return [record for record in _lines_of(run_dir) if "validation" not in record]


def validations_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each validation, by step, in the order of the file."""
    return {record["step"]: record["validation"] for record in _lines_of(run_dir) if "validation" in record}


def _lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [parse_json(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = parse_json((run_dir / "summary.json").read_text())
    return content


def losses_of(run_dir: Path) -> Tensor:
    return torch.tensor([record["loss"] for record in records_of(run_dir)], dtype=torch.double)


def tensors_of(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, under a name that does not depend on the layout."""
    files = newest_checkpoint(run_dir).glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def assert_same_end(run: Path, reference: Path, steps: int) -> None:
    """Every step is on the board once; tensors of the newest checkpoint and test metrics are equal."""
    assert steps_of(read_board(run), "loss/task") == list(range(1, steps + 1))
    ours, theirs = tensors_of(run), tensors_of(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    tests = [parse_json((path / "summary.json").read_text())["test"] for path in (run, reference)]
    assert tests[0] == tests[1]
