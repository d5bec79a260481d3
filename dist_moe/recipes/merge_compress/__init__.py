"""Merge, then compress: a model whose experts become fewer, by merging those that are alike or by pruning."""

from dist_moe.recipes.merge_compress.compress import compress_run, report_text
from dist_moe.recipes.merge_compress.directory import Compression, compress_directory
from dist_moe.recipes.merge_compress.settings import CompressConfig

__all__ = ["CompressConfig", "Compression", "compress_directory", "compress_run", "report_text"]
