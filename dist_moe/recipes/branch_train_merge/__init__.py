"""Branch-Train-Merge: experts trained apart, a domain each, from one seed, and used together."""

from dist_moe.recipes.branch_train_merge.btx import BTX
from dist_moe.recipes.branch_train_merge.clusters import Clusters
from dist_moe.recipes.branch_train_merge.forest import Forest
from dist_moe.recipes.branch_train_merge.merge import MERGES, MergeSettings, Scores
from dist_moe.recipes.branch_train_merge.partition import PARTITIONS, Partition, PartitionSettings
from dist_moe.recipes.branch_train_merge.recipe import BranchTrainMergeRecipe

__all__ = [
    "BTX",
    "MERGES",
    "PARTITIONS",
    "BranchTrainMergeRecipe",
    "Clusters",
    "Forest",
    "MergeSettings",
    "Partition",
    "PartitionSettings",
    "Scores",
]
