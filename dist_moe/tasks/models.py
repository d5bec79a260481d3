"""From a configuration and a problem to the model of a run."""

from __future__ import annotations

import torch

from dist_moe.gates import GateContext
from dist_moe.models import MoEModel, RunShape
from dist_moe.parallel import World
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.tasks.task import Problem


def build_model(config: RunConfig, problem: Problem, world: World) -> MoEModel:
    """This rank's part of the model; dense parameters are alike on all ranks."""
    steps_per_epoch = len(problem.train) // config.train.batch_size
    context = GateContext(problem.id_counts(), config.train.total_steps(steps_per_epoch))
    torch.manual_seed(config.seed)
    return problem.build_model(config.model, RunShape(world, steps_per_epoch, context))
