"""Supervised training: a model, a task, one fit; and what is done with finished runs."""

from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.evaluate import TrainedRun, evaluate_run, trained_run
from dist_moe.recipes.supervised.recipe import Stopped, SupervisedPlan, SupervisedRecipe, SupervisedResult

__all__ = [
    "Stopped",
    "SupervisedConfig",
    "SupervisedPlan",
    "SupervisedRecipe",
    "SupervisedResult",
    "TrainedRun",
    "evaluate_run",
    "trained_run",
]
