"""Real data sets, each fetched from named and verified sources, prepared once and memory-mapped.

A folder per data set; ``fetch`` brings and caches files; ``batches`` deals out rows to steps, micro-batches and ranks.
"""
