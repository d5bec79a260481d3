"""Loading checkpoints into an engine, at any layout."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor, nn

from dist_moe.engine.checkpoint.files import (
    checkpoints_of,
    partial_directory,
    publish,
    read_manifest,
    step_directory,
)
from dist_moe.engine.checkpoint.format import (
    BUFFER,
    DENSE_FILE,
    Key,
    SavedPlacements,
    TrainerState,
    expert_ids_by_parameter,
    read_trainer_state,
)
from dist_moe.engine.checkpoint.reader import CheckpointReader
from dist_moe.engine.checkpoint.safetensors_writer import write_tensors
from dist_moe.engine.deepspeed.config import DeepSpeedSection
from dist_moe.engine.deepspeed.optimizers import has_shape
from dist_moe.engine.deepspeed.parameter_state import MASTER, write_parameter_state
from dist_moe.engine.deepspeed.schedules import first_states
from dist_moe.errors import UserError
from dist_moe.parallel import Placement, gather_objects
from dist_moe.search.layers import moe_layers

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine


def agree_on_checkpoint(run_dir: Path, mine: Path | None) -> Path | None:
    """Return the first rank's choice among the checkpoints of a run, for all. Collective over all ranks.

    To another machine a shared directory may look older, and only some ranks have read every byte.
    """
    name = gather_objects(mine.name if mine else None)[0]
    return checkpoints_of(run_dir) / name if name else None


def load_checkpoint(engine: ExpertParallelEngine, directory: Path) -> TrainerState:
    """Copy masters, optimizer state and buffers of a verified checkpoint into ``engine``; advance its schedule.

    The schedule is that of the engine's configuration, after as many steps as the checkpoint's has taken.
    An imported checkpoint has no optimizer state; the optimizer then begins as at the first step of a run. Parameters
    that the engine does not train need none. Collective over all ranks. Raises UserError if the checkpoint is of
    another model.
    """
    trainer = read_trainer_state(directory)
    reader = CheckpointReader(directory)
    reader.check_model(engine.module)
    _restore_placements(engine.module, trainer.placements)
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    reader.check_states(trained, moments=bool(trainer.scalars))  # it cannot count steps and have no moments
    _copy_tensors(engine, reader, trained, trainer.scalars)
    engine.lr_scheduler.advance_to(trainer.schedule_steps)
    engine.global_steps = trainer.step
    return trainer


def check_optimizer_of_checkpoint(directory: Path, section: DeepSpeedSection) -> None:
    """Raise UserError unless the optimizer of a DeepSpeed section goes on from the states in a verified checkpoint.

    One without any state, as an imported one, suits all: the optimizer begins as at the first step of a run.
    """
    needed = {key: has_shape(state) for key, state in first_states(section).items()}
    entries = CheckpointReader(directory).entries.values()
    found = {state: True for entry in entries for state in entry.states if state not in (MASTER, BUFFER)}
    found |= dict.fromkeys(read_trainer_state(directory).scalars, False)
    if found and found != needed:
        raise UserError(
            f"deepspeed.optimizer.type={section['optimizer']['type']} cannot go on from {directory}: as configured it "
            f"keeps {', '.join(sorted(needed)) or 'nothing'} of every parameter, and the run's kept "
            f"{', '.join(sorted(found))}; leave deepspeed.optimizer as it was, or begin a new run from the weights "
            "(dist-moe export, then import)"
        )


def _restore_placements(model: nn.Module, saved: SavedPlacements) -> None:
    """Place the experts of every layer as saved, where that is for as many ranks and experts; else in order."""
    for name, layer in moe_layers(model).items():
        placement = Placement.identity(layer.experts.num_experts, layer.world.size)
        if name in saved:
            found = saved[name].placement
            if (found.num_experts, found.num_ranks) == (placement.num_experts, placement.num_ranks):
                placement = found
        layer.place(placement)


def load_weights(engine: ExpertParallelEngine, directory: Path) -> None:
    """Copy the masters and buffers alone of a verified checkpoint into ``engine``: to evaluate them there.

    Its optimizer state stays as it is. Collective over all ranks.
    """
    reader = CheckpointReader(directory)
    reader.check_model(engine.module)
    _copy_tensors(engine, reader, with_moments=(), scalars={})


def copy_with_buffers(source: Path, root: Path, buffers: Mapping[str, Tensor]) -> Path:
    """Copy a verified checkpoint to ``root`` with other values of some buffers; return the copy. For one process alone.

    Raises KeyError if the checkpoint has no such buffer.
    """
    manifest = read_manifest(source)
    final = step_directory(root, manifest.step)
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    tensors = load_file(source / DENSE_FILE)  # mapped into memory: not from the file that is written
    for name, value in buffers.items():
        key = str(Key(name, BUFFER))
        tensors[key] = value.to("cpu", tensors[key].dtype).view_as(tensors[key])
    files = manifest.files | {DENSE_FILE: write_tensors(partial / DENSE_FILE, tensors)}
    publish(partial, final, replace(manifest, files=files))
    return final


def _copy_tensors(
    engine: ExpertParallelEngine, reader: CheckpointReader, with_moments: Collection[str], scalars: dict[str, float]
) -> None:
    expert_ids = {name: ids for name, _, ids in expert_ids_by_parameter(engine.module)}
    states = {state for name in with_moments for state in reader.entries[name].states} - {MASTER}

    def read(name: str) -> dict[str, Tensor]:
        return reader.parameter(name, expert_ids[name], moments=name in with_moments)

    write_parameter_state(engine, sorted(states), scalars, read)
    reader.fill_buffers(engine.module)
