"""One rank's part of a checkpoint, copied to host memory so that training may go on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dist_moe.engine.checkpoint.format import (
    BUFFER,
    DENSE_FILE,
    CallbackStates,
    Key,
    TrainerState,
    TrainingHistory,
    expert_file,
    expert_ids_by_parameter,
)
from dist_moe.engine.checkpoint.safetensors_writer import write_tensors
from dist_moe.engine.deepspeed.parameter_state import ParameterState, read_parameter_state
from dist_moe.search.steps import moe_layers

if TYPE_CHECKING:
    from dist_moe.engine.deepspeed.engine import ExpertParallelEngine


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint.

    ``files``: this rank's tensors by file name and tensor name, in host memory, shared with nobody. ``trainer``: on
    the first rank. ``layout``: sizes and ZeRO stage of the job, to look at.
    """

    step: int
    files: dict[str, dict[str, Tensor]]
    trainer: TrainerState | None
    layout: dict[str, int]

    def write(self, directory: Path) -> dict[str, str]:
        """Write all files and flush them; return their sha256 by name. Needs no other rank. Raises OSError."""
        digests = {name: write_tensors(directory / name, tensors) for name, tensors in self.files.items()}
        return digests | (self.trainer.write(directory) if self.trainer else {})


def take_snapshot(
    engine: ExpertParallelEngine, step: int, history: TrainingHistory, callbacks: CallbackStates
) -> Snapshot:
    """Copy this rank's part of a checkpoint to host memory. Collective over all ranks."""
    state = read_parameter_state(engine)
    groups = engine.process_groups
    environment = groups.environment
    files: dict[str, dict[str, Tensor]] = {}
    trainer = None
    if environment.is_rank_zero:
        buffers = {Key(name, BUFFER): buffer for name, buffer in engine.module.named_buffers()}
        files[DENSE_FILE] = _host_copies(_states(engine, state, of_experts=False) | buffers)
        schedule = engine.lr_scheduler
        trainer = TrainerState(
            step,
            state.scalars,
            [float(group["lr"]) for group in engine.optimizer.param_groups],
            schedule.state_dict() if schedule is not None else None,
            {str(at): loss for at, loss in history.validation_losses.items()},
            history.seconds,
            placements={
                name: {
                    "num_ranks": layer.placement.num_ranks,
                    "expert_of_position": list(layer.placement.expert_of_position),
                }
                for name, layer in moe_layers(engine.module).items()
                if not layer.placement.is_identity
            },
            callbacks=copy.deepcopy(dict(callbacks)),
        )
    experts = _states(engine, state, of_experts=True) if groups.is_expert_writer else {}
    if experts:
        files[expert_file(groups.world.rank)] = _host_copies(experts)
    layout = {
        "world_size": environment.world_size,
        "expert_parallel_size": groups.expert_parallel_size,
        "zero_stage": engine.zero_optimization_stage(),
    }
    return Snapshot(step, files, trainer, layout)


def _states(engine: ExpertParallelEngine, state: ParameterState, *, of_experts: bool) -> dict[Key, Tensor]:
    """Return masters and moments of the dense parameters, or of this rank's experts one by one."""
    return {
        Key(name, kind, expert): tensor if expert is None else tensor[index]
        for name, _, expert_ids in expert_ids_by_parameter(engine.module)
        if (expert_ids is not None) == of_experts
        for kind, tensor in state.tensors[name].items()
        for index, expert in enumerate([None] if expert_ids is None else expert_ids)
    }


def _host_copies(tensors: dict[Key, Tensor]) -> dict[str, Tensor]:
    """Return copies, of tensors in host memory too: the next step changes them in place."""
    return {str(key): tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
