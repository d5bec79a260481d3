"""Merge, then compress: a model whose experts become fewer, by merging those that are alike or by pruning."""

from dist_moe.recipes.merge_compress.compress import compress_run, report_text
from dist_moe.recipes.merge_compress.directory import Compression, compress_directory
from dist_moe.recipes.merge_compress.recipe import MergeCompressConfig, MergeCompressRecipe
from dist_moe.recipes.merge_compress.settings import CompressConfig, RecoverConfig

__all__ = [
    "CompressConfig",
    "Compression",
    "MergeCompressConfig",
    "MergeCompressRecipe",
    "RecoverConfig",
    "compress_directory",
    "compress_run",
    "report_text",
]
