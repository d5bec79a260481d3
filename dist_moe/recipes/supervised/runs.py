"""Where trained weights are: a run directory, one of its checkpoints, or an exported file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_moe.config.overrides import parse_overrides
from dist_moe.engine.checkpoint import ModelWeights, place_weights, read_model, write_first_checkpoint, write_model
from dist_moe.engine.checkpoint.files import checkpoints_of, newest_checkpoint, tested_checkpoint
from dist_moe.engine.checkpoint.format import MANIFEST
from dist_moe.engine.checkpoint.reshard import reshard_checkpoint
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.models import models_of_kind
from dist_moe.parallel import SingleWorld, World
from dist_moe.recipes.identity import UNKNOWN, Identity, check_same, identity_in, let_pass
from dist_moe.recipes.recipe import load_config, set_fields, validate_config
from dist_moe.tasks.task import Task, run_shape


@dataclass(frozen=True)
class Weights:
    """Intact weights of a checkpoint or an exported file, with the configuration of their model."""

    stored: ModelWeights
    config: Any

    @property
    def path(self) -> Path:
        """The checkpoint or the exported file."""
        assert self.stored.path is not None
        return self.stored.path

    @property
    def identity(self) -> Identity:
        """Digests of the data that they were trained on; empty where they are not known."""
        return identity_in(self.stored.identity, self.path)

    def load(self, model: nn.Module) -> None:
        """Copy them into a bare model with any share of the experts. Raises UserError if they are not of it."""
        place_weights(model, self.stored)


def find_weights(path: Path) -> Weights:
    """Return the weights of a run (its best checkpoint if patience kept one, else its newest), checkpoint or file.

    Those of a recipe of stages are its result's, with the configuration of the stage that holds it.

    Raises UserError if it is none of them or is not intact.
    """
    if path.is_file():
        exported = read_model(path)
        return Weights(exported, validate_config(dict(exported.configuration)))
    run, checkpoint = _run_and_checkpoint(path)
    if run is None or not run.config.is_file():
        raise UserError(
            f"{path} is a checkpoint outside of a run directory: the configuration of its model is not known"
        )
    if checkpoint is not None:
        return Weights(read_model(checkpoint), load_config(run.config))
    result = result_of(run)
    found = tested_checkpoint(result.root)
    return Weights(read_model(found), load_config((result if result.config.is_file() else run).config))


def weights_named_by(field: str, path: Path) -> Weights:
    """Return what :func:`find_weights` does. Raises UserError, which names the configuration's ``field``."""
    try:
        return find_weights(path)
    except UserError as error:
        raise UserError(f"{field}: {error}; name a finished run, or a checkpoint in one") from error


def result_of(run: RunDirectory) -> RunDirectory:
    """Return the directory that holds the result of a run: its own, or that of a stage of its recipe.

    Raises UserError if that stage has not finished.
    """
    if not run.config.is_file():
        return run
    result = RunDirectory(load_config(run.config).recipe.result_of(run.root))
    if result != run and not result.result.is_file():
        raise UserError(
            f"{run.root}: its stage {result.root.name} has not finished; go on by 'dist-moe train --resume {run.root}'"
        )
    return result


def digest_of_weights(path: Path) -> str | None:
    """Return a digest of the values in a run, checkpoint or exported file, whichever layout wrote them; None if gone.

    Raises UserError for weights that are not intact.
    """
    return find_weights(path).stored.content_digest() if path.exists() else None


def check_same_data(source: Path, weights: Weights, task: Task, *, allowed: bool = False) -> list[str]:
    """Return the names of what differs between ``task`` and the data that ``weights`` of ``source`` were trained on.

    Raises UserError that names them unless ``allowed``; says on stderr what is let pass, or is not known.
    """
    names = check_same(source, weights.identity, Identity(data=task.digests()), allowed=allowed)
    remark = let_pass(names) if names else "" if weights.identity.data else UNKNOWN.format(source)
    if remark and LaunchEnvironment.read().is_rank_zero:
        print(f"warning: {remark}", file=sys.stderr)
    return names


def trained_model(run: Path, task: Task, world: World, device: torch.device | None = None) -> Any:
    """Return the model of a finished run for ``task``, fp32, with this rank's experts. Needs no process group.

    Raises UserError if the run is not intact, or if its model is of another name than the task's.
    """
    weights = find_weights(run)
    settings = weights.config.model
    if settings.kind != task.kind:
        wanted = " or ".join(models_of_kind(task.kind))
        raise UserError(f"{run} is a run of model.name={settings.name}, not of {wanted}; name one of {wanted}")
    with device or torch.device("cpu"):
        model = task.build_model(settings, run_shape(weights.config, task, world))
    weights.load(model)
    return model


def rehearsed_model(run: Path, task: Task) -> Any:
    """Return the whole model of a finished run without storage: its weights are there and fit. Raises UserError."""
    return trained_model(run, task, SingleWorld(), torch.device("meta"))


def export_weights(source: Path, target: Path, dtype: torch.dtype) -> ModelWeights:
    """``dist-moe export``: the weights of a run or checkpoint as one file. Raises UserError."""
    if source.is_file():
        raise UserError(f"{source} is a file; name a run directory or a checkpoint")
    weights = find_weights(source)
    model, data = weights.config.model, weights.config.data
    weights.stored.check_num_experts(model.expert_counts(data.target_names).values())
    return write_model(weights.stored, target, weights.config.plain(), dtype)


def import_weights(source: Path, run_dir: Path, overrides: Sequence[str] = ()) -> tuple[Path, ModelWeights]:
    """``dist-moe import``: an exported file as step 0 of a run that has yet to train. Its checkpoint, and the file.

    The configuration is the one in the file, with ``overrides``. Raises UserError.
    """
    run = RunDirectory(run_dir)
    with held(run_dir, LaunchEnvironment(), option="RUN_DIR"):
        run.check_unused("RUN_DIR")
        exported = read_model(source)
        content = dict(exported.configuration)
        set_fields(content, overrides)
        config = validate_config(content)
        config.check(config.parallel.expert_parallel_size)  # the least number of ranks
        # Whoever names other data trains on these from now on: what the weights saw before is no part of the new run.
        same_data = all(key.split(".")[0] != "data" for key in parse_overrides(overrides))
        identity = {"data": exported.identity.get("data", {})} if same_data else None
        imported_from = f"{source.name} ({exported.digest[:12]})"
        written = write_first_checkpoint(exported, checkpoints_of(run_dir), imported_from, identity)
        run.describe(config.plain(), LaunchEnvironment())  # last: its presence makes it a run
    return written, exported


def reshard_run(source: Path, output: Path, expert_files: int) -> Path:
    """``dist-moe reshard``: the newest checkpoint of a run, or the one named, with another number of expert
    files, in a run directory of its own. Returns the new checkpoint. Raises UserError."""
    run, checkpoint = _run_and_checkpoint(source)
    written = RunDirectory(output)
    with held(output, LaunchEnvironment(), option="--output"):
        written.check_unused("--output")
        if checkpoint is None:
            assert run is not None, "it is no checkpoint"
            run = result_of(run)
            checkpoint = newest_checkpoint(run.root)
        final = reshard_checkpoint(checkpoint, checkpoints_of(output), expert_files)
        if run is not None:
            for file in (run.environment, run.identity, run.config):
                if file.is_file():
                    shutil.copy(file, written.root)
    return final


def _run_and_checkpoint(path: Path) -> tuple[RunDirectory | None, Path | None]:
    """The run that ``path`` is or is in, and the checkpoint that it is."""
    if not (path / MANIFEST).exists():
        run = RunDirectory(path)
        run.check_exists()
        return run, None
    # As it was named first: its directory may be a link to another disk.
    for place in (path.absolute(), path.resolve()):
        run = RunDirectory(place.parent.parent)
        if run.config.is_file():
            return run, path
    return None, path


_GATE = "model.gate."


def for_evaluation(config: Any, overrides: Sequence[str]) -> Any:
    """Return ``config`` with ``model.gate.FIELD=VALUE`` overrides of options on which no weight depends.

    They are the gate's ``evaluation_fields``. Raises UserError for any other field, and for a wrong value.
    """
    if not overrides:
        return config
    gate = config.model.gate
    for key, value in parse_overrides(overrides).items():
        if key.removeprefix(_GATE) not in gate.evaluation_fields or not key.startswith(_GATE):
            allowed = ", ".join(_GATE + field for field in gate.evaluation_fields) or "none of this gate"
            raise UserError(f"{key}={value}: the weights belong to what they were trained with; allowed: {allowed}")
    content = config.plain()
    set_fields(content, overrides)
    changed = validate_config(content)
    for fault in changed.model.gate_errors():
        raise UserError(f"model.{fault}")
    return changed
