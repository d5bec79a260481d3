"""Recipes: whole methods, each a configuration, a sequence of stages and a result.

Importing this package registers the recipes that come with it.
"""

from dist_moe.recipes.branch_train_merge import BranchTrainMergeRecipe
from dist_moe.recipes.distillation import DHKDRecipe, MoEBERTRecipe
from dist_moe.recipes.merge_compress import MergeCompressRecipe
from dist_moe.recipes.mowst import MowstRecipe
from dist_moe.recipes.recipe import RECIPES, RecipeConfig, RecipeSettings, load_config, validate_config
from dist_moe.recipes.stages import StagedRecipe, Stages
from dist_moe.recipes.supervised import SupervisedConfig, SupervisedRecipe

for _settings in (
    SupervisedRecipe,
    MoEBERTRecipe,
    DHKDRecipe,
    BranchTrainMergeRecipe,
    MergeCompressRecipe,
    MowstRecipe,
):
    RECIPES.register(_settings)

__all__ = [
    "RECIPES",
    "BranchTrainMergeRecipe",
    "RecipeConfig",
    "RecipeSettings",
    "StagedRecipe",
    "Stages",
    "SupervisedConfig",
    "SupervisedRecipe",
    "load_config",
    "validate_config",
]
