"""Models: each a plain module that contains MoE layers."""

from dist_moe.models.recommender import Recommender, RecommenderConfig, RecommenderOutput

__all__ = ["Recommender", "RecommenderConfig", "RecommenderOutput"]
