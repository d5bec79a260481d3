"""Merge, then compress: a run whose experts become fewer, by merging those that are alike or by pruning."""

from dist_moe.recipes.merge_compress.compress import compress_run, report_text
from dist_moe.recipes.merge_compress.recipe import MergeCompressConfig, MergeCompressRecipe
from dist_moe.recipes.merge_compress.settings import CompressConfig, RecoverConfig

__all__ = [
    "CompressConfig",
    "MergeCompressConfig",
    "MergeCompressRecipe",
    "RecoverConfig",
    "compress_run",
    "report_text",
]
