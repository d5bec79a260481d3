"""Negative sampling: unrated pairs beside the rated ones make a binary task.

Nothing but the generator's uniform doubles are drawn and ordered, so the result depends on the bit generator's stream
alone, not on how a NumPy version implements ``choice`` or ``shuffle``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.progress import Progress

IntN = NDArray[np.int32]


def sample_uniform(
    user_N: IntN, item_N: IntN, num_users: int, num_items: int, rng: np.random.Generator, progress: Progress
) -> tuple[IntN, IntN]:
    """Draw as many unrated pairs as there are rated ones, uniformly over all unrated pairs, without replacement.

    How active a user is then tells much about "watched". If fewer unrated pairs exist, all are taken.
    ``user_N, item_N``: the rated pairs, without repeats. ``rng``: consumed by exactly ``num_users * num_items``
    doubles. Returns ``user_M, item_M``, ordered by user, then item.
    """
    progress.say(f"sampling negatives: {len(user_N):,} of {num_users * num_items:,} pairs")
    rated = user_N.astype(np.int64) * num_items + item_N
    subset = _unrated_subset(rated, num_users * num_items, rng)
    user_M, item_M = np.divmod(subset, num_items)
    return user_M.astype(np.int32), item_M.astype(np.int32)


def sample_per_user(
    user_N: IntN, item_N: IntN, num_users: int, num_items: int, rng: np.random.Generator, progress: Progress
) -> tuple[IntN, IntN]:
    """Draw as many unrated items for each user as the user rated; arguments and result as `sample_uniform`.

    How active a user is then tells nothing. A user who rated more than half of the items gets all the
    others. The COMET authors' data were made so: their committed MovieLens split counts 1,999,496 rows,
    922 fewer than twice the 1,000,209 ratings, and exactly one user (2,314 of 3,706 items rated, 1,392
    left) has fewer unrated items than ratings, by 922. ``user_N`` must be ascending.
    """
    assert np.all(np.diff(user_N) >= 0), "rated pairs must be ordered by user"
    bounds = np.searchsorted(user_N, np.arange(num_users + 1))
    chosen = [
        _unrated_subset(item_N[bounds[user] : bounds[user + 1]], num_items, rng).astype(np.int32)
        for user in progress.track(range(num_users), "sampling negatives", total=num_users, unit="users")
    ]
    user_M = np.repeat(np.arange(num_users, dtype=np.int32), [len(items) for items in chosen])
    return user_M, np.concatenate(chosen)


def _unrated_subset(rated: NDArray[Any], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return as many of 0..size-1 as ``rated`` holds, none of them in it, or all others if these are fewer."""
    wanted = min(len(rated), size - len(rated))
    priority = rng.random(size)
    priority[rated] = np.inf
    # The `wanted` smallest of independent uniforms are a uniform subset of that size.
    return np.sort(np.argpartition(priority, max(wanted - 1, 0))[:wanted])
