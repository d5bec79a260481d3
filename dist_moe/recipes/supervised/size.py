"""The size of a model before it exists: built without storage, and refused where it cannot fit this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dist_moe.engine.deepspeed.config import zero_stage
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks import Task, build_model
from dist_moe.tasks.task import run_shape

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux says how much memory a container may use: control groups of version 2, of version 1."""


class _PlannedWorld(SingleWorld):
    """A world of several ranks, of which only the number is real: nothing is exchanged in a plan."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def planned_model(config: SupervisedConfig, task: Task, size: int = 1) -> MoEModel:
    """Return a rank's part of the model, its experts over ``size`` ranks, without storage.

    Raises UserError if it cannot be built for the task, or if one of its tensors would have more elements than can be
    counted.
    """
    try:
        with torch.device("meta"):
            if config.model.num_moe_layers:  # the gate is asked first: a model of the user's may not come as far
                config.model.gate.build(1, config.model.slots_per_gate, run_shape(config, task, SingleWorld()).gates)
            model: MoEModel = build_model(config, task, _PlannedWorld(size))
    except ValueError as error:
        raise UserError(f"model.name={config.model.name} cannot be built for these data: {error}") from error
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"model: a tensor would have 2^63 elements or more ({error}); give it smaller sizes") from error
    return model


def check_model(config: SupervisedConfig, task: Task) -> MoEModel | None:
    """Return the model without storage, as a rank of the run has it; None if it cannot do without.

    Raises UserError if it cannot be built for the task.
    """
    try:
        return planned_model(config, task, config.parallel.expert_parallel_size)
    except UserError:
        raise
    except Exception:  # a module of the user's may read numbers while it is built, and there are none
        return None


def check_fits(config: SupervisedConfig, task: Task, environment: LaunchEnvironment) -> None:
    """Raise UserError for a model that cannot be built for the task, or that cannot fit this machine.

    It does not where weights and gradients alone take more memory; at ZeRO stage 3 weights alone count, of which every
    rank builds its share of the experts whole. What else a run needs is known to ``dist-moe plan``. A model that cannot
    be built without storage is not looked at.
    """
    model = check_model(config, task)
    if model is None:
        return
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ranks = environment.local_world_size or 1
    needed = weights * ranks * (1 if zero_stage(config.deepspeed) == 3 else 2)
    memory = memory_of(environment.device)
    if needed > memory:
        raise UserError(
            f"model: {count:,} parameters on each of {ranks} rank(s) here take {needed / 2**30:,.1f} GiB with their "
            f"gradients, and this machine has {memory / 2**30:,.1f} GiB; give it smaller sizes (model.num_experts="
            f"{config.model.num_experts}, ...) or more machines, see 'dist-moe plan'"
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that this machine's ranks share: of the host, or of all GPUs."""
    if device.type == "cuda":
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (path.read_text(encoding="ascii").strip() for path in map(Path, _LIMITS) if path.is_file())
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])
