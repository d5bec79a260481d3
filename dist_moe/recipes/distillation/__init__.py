"""What a teacher adds to the loss of a step, as losses that any recipe can use."""

from dist_moe.recipes.distillation.dhkd import DHKDConfig, binary_kl, binary_kl_norm
from dist_moe.recipes.distillation.moebert import MoEBERTConfig, hidden_mse, prediction_mse, symmetric_kl
from dist_moe.recipes.distillation.objective import DistillationObjective, Terms
from dist_moe.recipes.distillation.sections import DHKDSection, DistillationSection, MoEBERTSection
from dist_moe.recipes.distillation.teacher import Teacher

__all__ = [
    "DHKDConfig",
    "DHKDSection",
    "DistillationObjective",
    "DistillationSection",
    "MoEBERTConfig",
    "MoEBERTSection",
    "Teacher",
    "Terms",
    "binary_kl",
    "binary_kl_norm",
    "hidden_mse",
    "prediction_mse",
    "symmetric_kl",
]
