"""What one rank contributes to a checkpoint, held in host memory so that training may go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_moe.engine.checkpoint.files import digest_of, write_json
from dist_moe.engine.checkpoint.placements import SavedPlacements, placements_of
from dist_moe.engine.checkpoint.reader import BUFFER, expert_ids_by_parameter
from dist_moe.engine.checkpoint.tensor_file import write_tensors
from dist_moe.engine.deepspeed.parameter_state import ParameterState, read_parameter_state

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine

DENSE_FILE = "dense.safetensors"
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True)
class TrainingHistory:
    """How the training went so far. ``validation_losses``: by step. ``seconds``: spent training, in all."""

    validation_losses: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds besides tensors. ``scalars``: the optimizer's, see ParameterState.
    ``learning_rates``: of its parameter groups, which a schedule sets only at its next step.
    ``validation_losses``: of the run so far, by step. ``training_seconds``: of the run so far.
    ``imported_from``: the exported file whose weights these are, where there is no optimizer state yet.
    ``placements``: where experts do not lie in order. ``callbacks``: state by a callback's name."""

    step: int
    scalars: dict[str, float]
    learning_rates: list[float]
    lr_scheduler: dict[str, Any] | None
    validation_losses: dict[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    imported_from: str | None = None
    placements: SavedPlacements = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def history(self) -> TrainingHistory:
        losses = {int(step): loss for step, loss in self.validation_losses.items()}
        return TrainingHistory(losses, self.training_seconds)

    def write(self, directory: Path) -> dict[str, str]:
        """Write TRAINER_FILE; its digest by its name."""
        path = directory / TRAINER_FILE
        write_json(path, asdict(self))
        return {path.name: digest_of(path)}


@dataclass(frozen=True)
class Snapshot:
    """``files``: this rank's tensors by file name and tensor name, in host memory, shared with nobody.
    ``trainer``: on the first rank. ``layout``: sizes and ZeRO stage of the job, to look at."""

    step: int
    files: dict[str, dict[str, Tensor]]
    trainer: TrainerState | None
    layout: dict[str, int]

    def write(self, directory: Path) -> dict[str, str]:
        """Write all files for good; their sha256 by name. Needs no other rank. Raises OSError."""
        digests = {name: write_tensors(directory / name, tensors) for name, tensors in self.files.items()}
        return digests | (self.trainer.write(directory) if self.trainer else {})


def take_snapshot(
    engine: ExpertParallelEngine, step: int, history: TrainingHistory, callbacks: dict[str, dict[str, Any]]
) -> Snapshot:
    """Copy what this rank is to write. Collective over all ranks."""
    state = read_parameter_state(engine)
    groups = engine.process_groups
    environment = groups.environment
    files, trainer = _experts(engine, state), None
    if environment.is_rank_zero:
        files[DENSE_FILE] = _dense(engine, state)
        trainer = _trainer_state(engine, state, step, history, callbacks)
    layout = {
        "world_size": environment.world_size,
        "expert_parallel_size": groups.expert_parallel_size,
        "zero_stage": engine.zero_optimization_stage(),
    }
    return Snapshot(step, files, trainer, layout)


def _dense(engine: ExpertParallelEngine, state: ParameterState) -> dict[str, Tensor]:
    tensors = {
        f"{name}|{key}": _host_copy(tensor)
        for name, _, expert_ids in expert_ids_by_parameter(engine.module)
        if expert_ids is None
        for key, tensor in state.tensors[name].items()
    }
    return tensors | {f"{name}|{BUFFER}": _host_copy(buffer) for name, buffer in engine.module.named_buffers()}


def _experts(engine: ExpertParallelEngine, state: ParameterState) -> dict[str, dict[str, Tensor]]:
    """The experts of this rank, unless another rank speaks for them or the model has none."""
    groups = engine.process_groups
    if not groups.is_expert_writer:
        return {}
    tensors = {
        f"{name}|{key}|{expert}": _host_copy(tensor[index])
        for name, _, expert_ids in expert_ids_by_parameter(engine.module)
        for index, expert in enumerate(expert_ids or ())
        for key, tensor in state.tensors[name].items()
    }
    return {expert_file(groups.world.rank): tensors} if tensors else {}


def expert_file(index: int) -> str:
    return f"experts-{index:05d}.safetensors"


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy also where the tensor is in host memory: the next step changes it in place."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _trainer_state(
    engine: ExpertParallelEngine,
    state: ParameterState,
    step: int,
    history: TrainingHistory,
    callbacks: dict[str, dict[str, Any]],
) -> TrainerState:
    schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
    learning_rates = [float(group["lr"]) for group in engine.optimizer.param_groups]
    losses = {str(at): loss for at, loss in history.validation_losses.items()}
    return TrainerState(
        step,
        state.scalars,
        learning_rates,
        schedule,
        losses,
        history.seconds,
        placements=placements_of(engine.module),
        callbacks=callbacks,
    )
