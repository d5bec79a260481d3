"""Recommenders on tables with several targets, one file each, over the same embedding of a table's columns."""

from dist_moe.models.multi_task.front import TableFeatures
from dist_moe.models.multi_task.home import HomeConfig
from dist_moe.models.multi_task.levels import LevelsModel
from dist_moe.models.multi_task.mmoe import MMoE, MMoEConfig
from dist_moe.models.multi_task.ple import PLEConfig
from dist_moe.models.multi_task.shared_bottom import SharedBottom, SharedBottomConfig

__all__ = [
    "HomeConfig",
    "LevelsModel",
    "MMoE",
    "MMoEConfig",
    "PLEConfig",
    "SharedBottom",
    "SharedBottomConfig",
    "TableFeatures",
]
