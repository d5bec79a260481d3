"""Real data sets, each fetched from named and verified sources, prepared once and memory-mapped."""
