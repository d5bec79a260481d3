"""Saving beside the training: a copy in host memory, written by a thread per rank, published by the first rank.

The thread issues no collective and waits for nobody: it writes this rank's files and keeps their
digests. Whether all ranks have finished is learnt at a step boundary, where the ranks talk anyway; then
the first rank publishes. So a rank that dies meanwhile, or whose disk is full, leaves nothing visible.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint.files import drop_old, partial_directory, publish, set_aside, step_directory
from dist_moe.engine.checkpoint.format import (
    BUFFER,
    DENSE_FILE,
    CallbackStates,
    Key,
    Layout,
    Manifest,
    SavedPlacement,
    TrainerState,
    TrainingHistory,
    expert_file,
    expert_ids_by_parameter,
)
from dist_moe.engine.checkpoint.safetensors_writer import write_tensors
from dist_moe.engine.deepspeed.parameter_state import Piece, copy_to_host, state_keys, state_scalars
from dist_moe.engine.deepspeed.sharded_parameters import whole_shape
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank
from dist_moe.parallel import gather_objects
from dist_moe.search.layers import moe_layers

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine

CLOSE_PATIENCE_S = 60.0

Say = Callable[[str], None]


class CheckpointSaver:
    """Saves checkpoints of ``engine``, one at a time.

    ``failures_allowed``: checkpoints in a row that may fail (disk full, read-only, ...) before the
    training is ended by UserError, on all ranks alike. ``say``: where failures are reported; only the
    first rank speaks. ``check``: raises, on the first rank, where nothing may be written any more. Needs a file
    system that all ranks share.
    """

    def __init__(
        self,
        engine: ExpertParallelEngine,
        *,
        in_background: bool,
        failures_allowed: int,
        say: Say,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._in_background = in_background
        self._failures_allowed = failures_allowed
        self._say, self._check = say, check
        self._is_rank_zero = engine.process_groups.environment.is_rank_zero
        self._job: _Job | None = None
        self._failures: list[str] = []
        self._told: set[str] = set()

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._job is not None and self._job.is_alive()

    def save(
        self, root: Path, step: int, keep: int, history: TrainingHistory, callbacks: CallbackStates | None = None
    ) -> None:
        """Save as ``root/step-...`` and then drop all but the newest ``keep``. Collective over all ranks.

        ``callbacks``: what they hold, by their names; the first rank's is written. Waits for the save before it, then
        for a copy in host memory only. Raises UserError where more than ``failures_allowed`` saves in a row have
        failed.
        """
        self.settle()
        directory = step_directory(root, step)
        if errors := gather_errors(run_catching(self._prepare, directory) if self._is_rank_zero else None):
            self._failed(directory, errors)
            return
        self._job = _Job(take_snapshot(self._engine, step, history, callbacks or {}), directory, keep)
        if self._in_background:
            self._job.start()
        else:
            self._job.run()
            self.settle()

    def settle(self) -> None:
        """Wait for the threads of all ranks; publish, or report why not. Collective over all ranks."""
        if self._job is None:
            return
        job, self._job = self._job, None
        job.wait()
        written = gather_objects(job.digests)
        errors = gather_errors(job.error)
        if not errors:
            files = {name: digest for one in written for name, digest in one.items()}
            errors = gather_errors(run_catching(job.publish, files) if self._is_rank_zero else None)
        if errors:
            self._failed(job.directory, errors)
            return
        self._failures = []
        if self._is_rank_zero:
            self._clean_up(job)

    def _clean_up(self, job: _Job) -> None:
        """Drop old checkpoints. The new one is written already: what goes wrong here is told, once for each cause."""
        if job.moved_aside is not None:
            self._say(f"warning: what stood in the place of {job.directory} is now {job.moved_aside}")
        for cause, sentence in drop_old(job.directory, job.keep).items():
            if cause not in self._told:
                self._told.add(cause)
                self._say(f"warning: {sentence}; the training goes on, and says this once")

    def finish(self) -> None:
        """Settle for good. Collective. Raises UserError if the last save has failed, however many may fail."""
        self.settle()
        if self._failures:
            raise UserError(f"the run's last checkpoint is missing: {self._failures[-1]}; {_REMEDY}")

    def close(self) -> None:
        """Wait for this rank's thread and publish nothing; for the way out after an error."""
        if self._job is not None:
            self._job.wait(CLOSE_PATIENCE_S)
            self._job = None

    def _prepare(self, directory: Path) -> None:
        self._check()
        partial = partial_directory(directory)
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)  # of a save that failed
        elif os.path.lexists(partial):
            set_aside(partial, "replaced")
        partial.parent.mkdir(exist_ok=True)  # not what is above it: a run directory that was renamed is not made again
        partial.mkdir()

    def _failed(self, directory: Path, errors: list[str]) -> None:
        if self._is_rank_zero:
            shutil.rmtree(partial_directory(directory), ignore_errors=True)  # it may hold what the disk lacks
        self._failures.append(f"checkpoint {directory} could not be written: {'; '.join(errors)}")
        if len(self._failures) > self._failures_allowed:
            raise UserError(
                f"{self._failures[-1]}. That is {len(self._failures)} in a row, and "
                f"train.checkpoint_failures_allowed={self._failures_allowed}; {_REMEDY}"
            )
        if self._is_rank_zero:
            self._say(f"warning: {self._failures[-1]}; going on, older ones stay as they are")


_REMEDY = "older ones are untouched: fix the place, then go on with dist-moe train --resume"


class _Job(threading.Thread):
    """One rank's share of one checkpoint. ``digests``: of its files, once written; ``error``: why they are not.

    ``keep``: how many stay once it is published. ``moved_aside``: what stood in its place.
    """

    def __init__(self, snapshot: Snapshot, directory: Path, keep: int) -> None:
        super().__init__(name=f"write {directory.name}", daemon=True)
        self.directory = directory
        self.digests: dict[str, str] = {}
        self.error: str | None = None
        self._snapshot: Snapshot | None = snapshot
        self._step, self._layout = snapshot.step, snapshot.layout
        self.keep = keep
        self.moved_aside: Path | None = None

    def run(self) -> None:
        """Write this rank's files; what goes wrong is kept as ``error``."""
        assert self._snapshot is not None
        self.error = run_catching(self._write, self._snapshot)
        self._snapshot = None  # its memory is free from here on

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the thread, if one was started."""
        if self.ident is not None:
            self.join(timeout)

    def publish(self, files: dict[str, str]) -> None:
        """Make the checkpoint of all ranks' ``files`` visible."""
        manifest = Manifest(self._step, files, layout=self._layout)
        self.moved_aside = publish(partial_directory(self.directory), self.directory, manifest)

    def _write(self, snapshot: Snapshot) -> None:
        self.digests = snapshot.write(partial_directory(self.directory))


def run_catching(function: Callable[..., None], *arguments: object) -> str | None:
    """Run ``function``; return its error in words, or None.

    Nothing may escape on one rank while the others wait for it in the next collective.
    """
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def gather_errors(error: str | None) -> list[str]:
    """Return the errors of all ranks, on every rank. Collective over all ranks."""
    return [f"rank {rank}: {one}" for rank, one in enumerate(gather_objects(error)) if one is not None]


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint.

    ``files``: this rank's tensors by file name and tensor name, in host memory, shared with nobody. ``trainer``: on
    the first rank. ``layout``: of the job, to look at.
    """

    step: int
    files: dict[str, dict[str, Tensor]]
    trainer: TrainerState | None
    layout: Layout

    def write(self, directory: Path) -> dict[str, str]:
        """Write all files and flush them; return their sha256 by name. Needs no other rank. Raises OSError."""
        digests = {name: write_tensors(directory / name, tensors) for name, tensors in self.files.items()}
        return digests | (self.trainer.write(directory) if self.trainer else {})


def take_snapshot(
    engine: ExpertParallelEngine, step: int, history: TrainingHistory, callbacks: CallbackStates
) -> Snapshot:
    """Copy this rank's part of a checkpoint to host memory. Collective over all ranks.

    The first rank has what is dense; the ranks that hold copies of an expert take turns, so that no node writes all.
    """
    groups = engine.process_groups
    environment = groups.environment
    files = _states_on_host(engine)
    trainer = None
    if environment.is_rank_zero:
        files[DENSE_FILE] |= {
            str(Key(name, BUFFER)): buffer.detach().to("cpu", copy=True).contiguous()  # the next step changes it
            for name, buffer in engine.module.named_buffers()
        }
        trainer = TrainerState(
            step,
            state_scalars(engine),
            engine.lr_scheduler.steps,
            {str(at): loss for at, loss in history.validation_losses.items()},
            history.seconds,
            placements={
                name: SavedPlacement(layer.placement.num_ranks, list(layer.placement.expert_of_position))
                for name, layer in moe_layers(engine.module).items()
                if not layer.placement.is_identity
            },
            callbacks=copy.deepcopy(dict(callbacks)),
        )
    layout = Layout(environment.world_size, groups.expert_parallel_size, engine.zero_optimization_stage())
    return Snapshot(step, {name: tensors for name, tensors in files.items() if tensors}, trainer, layout)


def _states_on_host(engine: ExpertParallelEngine) -> dict[str, dict[str, Tensor]]:
    """Return masters and moments that this rank writes, by file and tensor. Collective over all ranks."""
    environment = engine.process_groups.environment
    dense: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    keys = state_keys(engine)
    in_order = sorted(expert_ids_by_parameter(engine.module), key=lambda entry: entry[2] is not None)
    turns = _turns(engine)
    pieces = []
    for name, parameter, expert_ids in in_order:
        for state in keys if parameter.requires_grad else keys[:1]:  # the master alone of one that is held still
            if expert_ids is None:
                shape = whole_shape(parameter)
                mine = environment.is_rank_zero
                pieces.append(_piece(parameter, state, 0, shape, dense if mine else None, Key(name, state)))
                continue
            shape = whole_shape(parameter)[1:]
            for index, expert in enumerate(expert_ids):
                mine = turns(name, index)
                key = Key(name, state, expert)
                pieces.append(_piece(parameter, state, index, shape, experts if mine else None, key))
    copy_to_host(engine, pieces)
    return {DENSE_FILE: dense, expert_file(environment.rank): experts}


def _piece(
    parameter: nn.Parameter, state: str, index: int, shape: torch.Size, tensors: dict[str, Tensor] | None, key: Key
) -> Piece:
    """Return the ``index``-th part of ``shape`` of a parameter, with a place in ``tensors`` where there are some."""
    count = shape.numel()
    host = None
    if tensors is not None:
        tensors[str(key)] = torch.empty(shape)
        host = tensors[str(key)].view(-1)
    return Piece(parameter, state, index * count, count, host)


def _turns(engine: ExpertParallelEngine) -> Callable[[str, int], bool]:
    """Return whether this rank writes the index-th expert of a parameter, of the ranks that hold a copy of it.

    They take turns over experts, layers and expert-parallel ranks, with all parameters of an expert at once.
    """
    groups = engine.process_groups
    banks = [(name, bank) for name, bank in engine.module.named_modules() if isinstance(bank, ExpertBank)]
    bank_of = {
        f"{name}.{parameter}" if name else parameter: number
        for number, (name, bank) in enumerate(banks)
        for parameter, _ in bank.named_parameters()
    }
    return lambda name, index: (bank_of[name] + index + groups.world.rank) % groups.copies == groups.copy
