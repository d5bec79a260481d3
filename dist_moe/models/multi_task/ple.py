"""PLE: progressive layered extraction, levels of customised gate control (CGC); Tang et al., RecSys 2020.

    level l, target t       x_t' = sum over {E_t, E_sh} of softmax(W_t x_t) E(x of the expert)
    level l, shared         x_sh' = sum over all experts of softmax(W_sh x_sh) E(x of the expert); not at the last level

At the first level every expert and every gate sees the embedded row; later, experts and gate of target t see x_t,
those that are shared see x_sh. One level is CGC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from dist_moe.config.settings import LARGEST_COUNT, LARGEST_DEPTH
from dist_moe.models.multi_task.levels import SHARED, LevelOutput, LevelsConfig, LevelShape


class PLEConfig(LevelsConfig):
    """Experts of each target and shared ones, at several levels."""

    name: Literal["ple"] = Field("ple", description="which model this is")
    levels: int = Field(2, ge=1, le=LARGEST_DEPTH, description="levels of experts and gates (1: CGC)")
    target_experts: int = Field(2, ge=1, le=LARGEST_COUNT, description="experts of each target, at each level")
    shared_experts: int = Field(2, ge=1, le=LARGEST_COUNT, description="experts of all targets, at each level")

    @property
    def num_moe_layers(self) -> int:
        """Number of levels."""
        return self.levels

    @property
    def slots_per_gate(self) -> int:
        """Number of experts that a target's gate chooses among."""
        return self.target_experts + self.shared_experts

    def shapes(self, targets: Sequence[str]) -> tuple[LevelShape, ...]:
        """Return the levels, the experts of each target first, in order, then the shared ones."""
        count, own = len(targets), self.target_experts
        shared = range(count * own, count * own + self.shared_experts)
        owners = (*(name for name in targets for _ in range(own)), *[SHARED] * self.shared_experts)

        def level(number: int) -> LevelShape:
            stream_of_input = range(count + 1) if number else [0] * (count + 1)
            outputs = [
                LevelOutput(name, (stream_of_input[t],), (*range(t * own, (t + 1) * own), *shared))
                for t, name in enumerate(targets)
            ]
            if number < self.levels - 1:
                outputs.append(LevelOutput(SHARED, (stream_of_input[count],), tuple(range(shared.stop))))
            streams = [stream_of_input[min(e // own, count)] for e in range(shared.stop)]
            return LevelShape(max(stream_of_input) + 1, tuple(streams), owners, tuple(outputs))

        return tuple(map(level, range(self.levels)))
