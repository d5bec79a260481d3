"""When experts move to other ranks while training, and whether a move pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from dist_moe.config.settings import Settings
from dist_moe.parallel import Placement
from dist_moe.search.placement import choose_placement, imbalance_bounds, rank_imbalance


class PlacementScheduleConfig(Settings):
    """Moving experts between ranks while training."""

    every_steps: int = Field(200, ge=1, description="steps between two looks at the load of the ranks")
    threshold: float = Field(
        1.1,
        ge=1,
        description="imbalance (load of the heaviest rank over the mean) up to which experts stay where they are; "
        "1 asks at every look whether a move pays",
    )
    window: int = Field(
        200, ge=1, description="newest recorded steps whose load counts; steps are recorded every train.log_every"
    )
    horizon_steps: int = Field(
        1000, ge=1, description="steps, at most those left, for which the measured load is expected to last"
    )
    least_return: float = Field(
        1.0,
        ge=0,
        description="bytes saved within the horizon per byte that the busiest rank sends for a move, at least",
    )
    slack: float = Field(
        0.01,
        ge=0,
        description="how much heavier than need be the heaviest rank may be, in units of the mean, for fewer moves "
        "and for experts on one node that the same tokens want",
    )

    def due(self, step: int) -> bool:
        """Whether a look follows training step ``step`` (counted from 1)."""
        return step % self.every_steps == 0


@dataclass(frozen=True)
class MoveCosts:
    """``row_bytes``: what one (token, expert) row has on the wire in a step, there and back, forward and
    backward. ``expert_bytes``: what travels with one expert. ``groups``: expert-parallel groups, which share
    the load equally. ``steps_left``: of the run."""

    row_bytes: int
    expert_bytes: int
    groups: int
    steps_left: int


@dataclass(frozen=True)
class PlacementLook:
    """One look at the load. ``before``, ``after``: imbalance of the ranks under the present placement and under
    the one that follows, for the same load. ``bound``: what no placement can beat. ``moved``: experts that
    changed their ranks. ``bytes``: that all ranks sent for it."""

    before: float
    after: float
    bound: float
    moved: int = 0
    bytes: int = 0

    def sentence(self, step: int) -> str:
        """Return the look in words, for the progress line."""
        return (
            f"placement after step {step}: heaviest rank {self.before:.3f} -> {self.after:.3f} times the mean "
            f"(bound {self.bound:.3f}), {self.moved} expert(s) moved, {self.bytes / 1e6:.3g} MB"
        )


def over_layers(looks: Sequence[PlacementLook]) -> dict[str, float]:
    """Return the numbers that trackers show under ``placement/``: the worst layer's imbalance, sums of the moves."""
    return {
        "imbalance_before": max(look.before for look in looks),
        "imbalance_after": max(look.after for look in looks),
        "imbalance_bound": max(look.bound for look in looks),
        "moved_experts": sum(look.moved for look in looks),
        "bytes": sum(look.bytes for look in looks),
    }


def propose(
    config: PlacementScheduleConfig,
    load_LE: ArrayLike,
    current: Placement,
    together_EE: ArrayLike | None,
    ranks_per_node: int,
    costs: MoveCosts,
) -> tuple[Placement, PlacementLook]:
    """Return the placement for the load of L steps, and the look at it; the present one unless a move pays.

    The model: a step lasts as long as its heaviest rank, whose rows travel to it and back. A better placement
    takes ``max_rows_before - max_rows_after`` rows a step off it, ``row_bytes`` each, for ``horizon_steps``;
    against it stand the bytes that the busiest rank sends for the move, ``expert_bytes`` for each expert that
    leaves it. The move pays if

        saved rows a step * row_bytes * min(horizon_steps, steps_left) >= least_return * bytes of the busiest rank.

    Rows also cost arithmetic, and bytes between nodes more than others; both favour a move and are left out.
    """
    load_LE = np.asarray(load_LE, dtype=float)
    load_E = load_LE.sum(0)
    before = rank_imbalance(load_E, current)
    _, bound = imbalance_bounds(load_E, current.num_ranks)
    stay = current, PlacementLook(before, before, bound)
    if before <= config.threshold:
        return stay
    choice = choose_placement(load_E, current, together_EE, ranks_per_node=ranks_per_node, slack=config.slack)
    mean_rows = load_E.sum() / (len(load_LE) * costs.groups * current.num_ranks)
    saved_bytes = (before - choice.after) * mean_rows * costs.row_bytes * min(config.horizon_steps, costs.steps_left)
    if not choice.moved:
        return stay
    leaving_R = np.bincount([current.rank_of(expert) for expert in choice.moved])
    if saved_bytes < config.least_return * int(leaving_R.max()) * costs.expert_bytes:
        return stay
    return choice.placement, PlacementLook(before, choice.after, bound)
