"""Recommendation: was the item watched, and how was it rated? On MovieLens."""

from typing import ClassVar

from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.tasks.recommendation.task import TARGETS, RecommendationTask
from dist_moe.tasks.settings import TaskSettings


class RecommendationSettings(MovieLensConfig, TaskSettings):
    """MovieLens, with the targets ``watched`` and ``rating``."""

    kind: ClassVar[str] = "recommendation"
    target_names: ClassVar[tuple[str, ...]] = TARGETS

    def open(self, *, progress: bool) -> RecommendationTask:
        """Prepare the ratings and return the task."""
        return RecommendationTask(prepare_movielens(self, progress=progress))


__all__ = ["RecommendationSettings", "RecommendationTask"]
