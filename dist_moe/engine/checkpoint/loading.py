"""Checkpoints: complete or invisible, portable between layouts, every file with a digest.

    checkpoints/step-00000500/
        manifest.json             format, step, layout that wrote it, digests, and a digest of itself
        dense.safetensors         "NAME|master", "NAME|exp_avg", ... and "NAME|buffer"
        experts-00001.safetensors "NAME|master|EXPERT", ...: the experts of expert-parallel rank 1
        trainer.json              step, optimizer's step counter, learning-rate schedule, validations, placements

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_moe.engine.checkpoint.files import Manifest, partial_directory, publish, read_manifest
from dist_moe.engine.checkpoint.placements import restore_placements
from dist_moe.engine.checkpoint.reader import BUFFER, CheckpointReader, expert_ids_by_parameter
from dist_moe.engine.checkpoint.saver import CheckpointSaver
from dist_moe.engine.checkpoint.snapshot import DENSE_FILE, TRAINER_FILE, TrainerState, TrainingHistory
from dist_moe.engine.checkpoint.tensor_file import write_tensors
from dist_moe.engine.deepspeed.parameter_state import MASTER, ParameterState, write_parameter_state

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine


def save_checkpoint(
    engine: ExpertParallelEngine, root: Path, step: int, keep: int, history: TrainingHistory | None = None
) -> None:
    """Write ``root/step-...``, here and now, and drop all but the newest ``keep``. Collective over all ranks.

    Raises UserError if it cannot be written.
    """
    saver = CheckpointSaver(engine, in_background=False, failures_allowed=0, say=print)
    saver.save(root, step, keep, history or TrainingHistory())


def read_trainer_state(directory: Path) -> TrainerState:
    """Of a verified checkpoint."""
    return TrainerState(**json.loads((directory / TRAINER_FILE).read_text()))


def load_checkpoint(engine: ExpertParallelEngine, directory: Path) -> TrainerState:
    """Bring masters, optimizer state, buffers and schedule of a verified checkpoint into ``engine``.

    An imported checkpoint has no optimizer state; the optimizer then begins as at the first step of a run.
    Raises UserError if the checkpoint is of another model.
    """
    trainer = read_trainer_state(directory)
    reader = CheckpointReader(directory)
    restore_placements(engine.module, trainer.placements)
    reader.check_states(moments=bool(trainer.scalars))  # it cannot count steps and have no moments
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
    manifest: Manifest = read_manifest(partial)
    tensors = load_file(source / DENSE_FILE)  # mapped into memory: not from the file that is written
    for name, value in buffers.items():
        key = f"{name}|{BUFFER}"
        tensors[key] = value.to("cpu", tensors[key].dtype).view_as(tensors[key])
    files = manifest.files | {DENSE_FILE: write_tensors(partial / DENSE_FILE, tensors)}
    publish(partial, final, replace(manifest, files=files))
    return final
