"""From a configuration to the problem whose data it names."""

from __future__ import annotations

from dist_moe.data.movielens import MovieLensConfig, prepare
from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.data.two_images import prepare_two_images
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.language_model import LanguageModelProblem
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.recommender import RecommenderProblem
from dist_moe.recipes.two_images import TwoImagesProblem


def open_problem(config: RunConfig, *, progress: bool) -> Problem:
    """Prepare the data. Raises UserError if the data cannot be had."""
    if isinstance(config.data, MovieLensConfig):
        return RecommenderProblem(prepare(config.data, progress=progress))
    if isinstance(config.data, TextConfig):
        return LanguageModelProblem(prepare_text(config.data, progress=progress))
    return TwoImagesProblem(prepare_two_images(config.data, progress=progress))
