"""Distillation: what a teacher adds to the loss of a step, and the recipes that train by it."""

from dist_moe.recipes.distillation.dhkd import DHKDConfig, binary_kl, binary_kl_norm
from dist_moe.recipes.distillation.moebert import MoEBERTConfig, hidden_mse, prediction_mse, symmetric_kl
from dist_moe.recipes.distillation.objective import DistillationObjective, Terms
from dist_moe.recipes.distillation.predictions import FollowConfig, follow, softened_kl
from dist_moe.recipes.distillation.recipe import DHKDRecipe, MoEBERTRecipe
from dist_moe.recipes.distillation.teacher import Teacher

__all__ = [
    "DHKDConfig",
    "DHKDRecipe",
    "DistillationObjective",
    "FollowConfig",
    "MoEBERTConfig",
    "MoEBERTRecipe",
    "Teacher",
    "Terms",
    "binary_kl",
    "binary_kl_norm",
    "follow",
    "hidden_mse",
    "prediction_mse",
    "softened_kl",
    "symmetric_kl",
]
