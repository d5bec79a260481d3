"""Checkpoints: complete or invisible, portable between layouts, every file with a digest.

    checkpoints/step-00000500/
        manifest.json             format, step, digests
        dense.safetensors         "NAME|master", "NAME|exp_avg", ... and "NAME|buffer"
        experts-00001.safetensors "NAME|master|EXPERT", ...: the experts of expert-parallel rank 1
        trainer.json              step, optimizer's step counter, learning-rate schedule, placements

Experts are stored one by one under their global id, masters and moments whole and in fp32, so that
a checkpoint loads at any number of ranks, expert-parallel size and ZeRO stage: with its placements
where the expert-parallel size is the same, else with experts in order. Every random number
of a step is drawn from (seed, step, rank), and the order of the data from (seed, epoch), hence
neither has a state to save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_moe.engine.checkpoint_files import (
    MANIFEST,
    Manifest,
    digest_of,
    drop_old,
    partial_directory,
    publish,
    step_directory,
    write_json,
)
from dist_moe.engine.checkpoint_reader import BUFFER, CheckpointReader, expert_ids_by_parameter
from dist_moe.engine.collectives import gather_objects, wait_for_all
from dist_moe.engine.expert_parallel_engine import ExpertParallelEngine
from dist_moe.engine.parameter_state import (
    MASTER,
    ParameterState,
    read_parameter_state,
    write_parameter_state,
)
from dist_moe.engine.placement_state import SavedPlacements, placements_of, restore_placements

DENSE_FILE = "dense.safetensors"
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds besides tensors. ``scalars``: the optimizer's, see ParameterState.
    ``learning_rates``: of its parameter groups, which a schedule sets only at its next step.
    ``validation_losses``: of the run so far, by step. ``placements``: where experts do not lie in order."""

    step: int
    scalars: dict[str, float]
    learning_rates: list[float]
    lr_scheduler: dict[str, Any] | None
    validation_losses: dict[str, float] = field(default_factory=dict)
    placements: SavedPlacements = field(default_factory=dict)


def save_checkpoint(
    engine: ExpertParallelEngine,
    root: Path,
    step: int,
    keep: int,
    validation_losses: Mapping[int, float] | None = None,
) -> Path:
    """Write ``root/step-...`` and drop all but the newest ``keep``. Collective over all ranks.

    A process that dies meanwhile leaves nothing that counts as a checkpoint. Needs a file system
    that all ranks share.
    """
    final = step_directory(root, step)
    partial = partial_directory(final)
    is_first = engine.process_groups.environment.is_first
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state = read_parameter_state(engine)
    wait_for_all()
    written = _write_experts(engine, state, partial)
    if is_first:
        trainer = _trainer_state(engine, state, step, validation_losses or {})
        written |= _write_dense(engine, state, partial) | _write_trainer(trainer, partial)
    files = {name: digest for one in gather_objects(written) for name, digest in one.items()}
    if is_first:
        publish(partial, final, Manifest(step, files))
        drop_old(root, keep)
    wait_for_all()
    return final


def load_checkpoint(engine: ExpertParallelEngine, directory: Path) -> TrainerState:
    """Bring masters, optimizer state, buffers and schedule of a verified checkpoint into ``engine``.

    Raises UserError if the checkpoint is of another model.
    """
    trainer = TrainerState(**json.loads((directory / TRAINER_FILE).read_text()))
    reader = CheckpointReader(directory)
    restore_placements(engine.module, trainer.placements)
    tensors = {
        name: reader.parameter(name, parameter, expert_ids)
        for name, parameter, expert_ids in expert_ids_by_parameter(engine.module)
    }
    write_parameter_state(engine, ParameterState(tensors, trainer.scalars))
    reader.fill_buffers(engine.module)
    if engine.lr_scheduler is not None and trainer.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(trainer.lr_scheduler)
        for group, learning_rate in zip(engine.optimizer.param_groups, trainer.learning_rates, strict=True):
            group["lr"] = learning_rate
    engine.global_steps = trainer.step
    return trainer


def load_weights(engine: ExpertParallelEngine, directory: Path) -> None:
    """Bring the masters and buffers alone of a verified checkpoint into ``engine``: to evaluate them there.

    Its optimizer state stays as it is. Collective over all ranks.
    """
    reader = CheckpointReader(directory)
    masters = {
        name: {MASTER: reader.parameter(name, parameter, expert_ids)[MASTER]}
        for name, parameter, expert_ids in expert_ids_by_parameter(engine.module)
    }
    write_parameter_state(engine, ParameterState(masters, {}))
    reader.fill_buffers(engine.module)


@torch.no_grad()
def load_model(model: nn.Module, directory: Path) -> None:
    """Bring the masters and buffers of a verified checkpoint into a bare model, at any layout."""
    reader = CheckpointReader(directory)
    for name, parameter, expert_ids in expert_ids_by_parameter(model):
        parameter.copy_(reader.parameter(name, parameter, expert_ids)[MASTER])
    reader.fill_buffers(model)


def copy_with_buffers(source: Path, root: Path, buffers: Mapping[str, Tensor]) -> Path:
    """A verified checkpoint again, under ``root``, with other values of some buffers. For one process alone.

    Raises KeyError if the checkpoint has no such buffer.
    """
    final = root / source.name
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    manifest = Manifest(**json.loads((partial / MANIFEST).read_text()))
    tensors = load_file(partial / DENSE_FILE)
    for name, value in buffers.items():
        key = f"{name}|{BUFFER}"
        tensors[key] = value.to("cpu", tensors[key].dtype).view_as(tensors[key])
    files = manifest.files | _write_tensors(partial / DENSE_FILE, tensors)
    publish(partial, final, Manifest(manifest.step, files))
    return final


def _write_dense(engine: ExpertParallelEngine, state: ParameterState, directory: Path) -> dict[str, str]:
    tensors = {
        f"{name}|{key}": tensor
        for name, _, expert_ids in expert_ids_by_parameter(engine.module)
        if expert_ids is None
        for key, tensor in state.tensors[name].items()
    }
    tensors |= {f"{name}|{BUFFER}": buffer for name, buffer in engine.module.named_buffers()}
    return _write_tensors(directory / DENSE_FILE, tensors)


def _write_experts(engine: ExpertParallelEngine, state: ParameterState, directory: Path) -> dict[str, str]:
    """The experts of this rank, unless another rank speaks for them or the model has none."""
    groups = engine.process_groups
    tensors = {
        f"{name}|{key}|{expert}": tensor[index]
        for name, _, expert_ids in expert_ids_by_parameter(engine.module)
        for index, expert in enumerate(expert_ids or ())
        for key, tensor in state.tensors[name].items()
    }
    if not tensors or not groups.is_expert_writer:
        return {}
    return _write_tensors(directory / f"experts-{groups.world.rank:05d}.safetensors", tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    return {path.name: digest_of(path)}


def _trainer_state(
    engine: ExpertParallelEngine, state: ParameterState, step: int, validation_losses: Mapping[int, float]
) -> TrainerState:
    schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
    learning_rates = [float(group["lr"]) for group in engine.optimizer.param_groups]
    losses = {str(at): loss for at, loss in validation_losses.items()}
    return TrainerState(step, state.scalars, learning_rates, schedule, losses, placements_of(engine.module))


def _write_trainer(trainer: TrainerState, directory: Path) -> dict[str, str]:
    path = directory / TRAINER_FILE
    write_json(path, asdict(trainer))
    return {path.name: digest_of(path)}
