"""Real data sets, each fetched from named and verified sources, prepared once and memory-mapped.

`dist_moe.data.movielens`: pairs of users and items, with ratings. `dist_moe.data.two_images`: pairs of images
in one frame. `dist_moe.data.batches` deals out the rows of either to steps, micro-batches and ranks.
"""
