"""MovieLens: did a user watch a movie, and how was it rated? `prepare_movielens` gives tables of pairs."""

from dist_moe.data.movielens.prepare import MovieLens, MovieLensConfig, PairBatch, PairTable, prepare_movielens

__all__ = ["MovieLens", "MovieLensConfig", "PairBatch", "PairTable", "prepare_movielens"]
