"""The window of a table search: while gates harden, by their measured entropy.

A gate that hardens (COMET's trees, DSelect-k's selectors) records the entropy of its choice as an auxiliary loss. Its
share of the largest possible one falls from 1, where every slot is as likely as any other, to 0. Before, experts are
alike and no table is better than another; after, every expert has adapted to its slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_moe.layer import MoE


class EntropyWindow:
    """Whether a search may follow a step: ``low`` <= share <= ``high``, and no share below ``low`` was ever measured.

    Measured by the records of every ``train.log_every``-th step, which are the same on all ranks and collected anyway.
    What a checkpoint or an end collects between them is passed over: a resumed run decides as the undisturbed one.
    A share that is not finite, of a step that was skipped, is none. ``share``: the last one, None before the first.
    """

    def __init__(self, high: float, low: float) -> None:
        self._high, self._low = high, low
        self.share: float | None = None
        self._lowest = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the gates are harder than the window, or once were."""
        return self._lowest < self._low

    @property
    def is_open(self) -> bool:
        """Whether the gates are within the window."""
        return self.share is not None and self.share <= self._high and not self.is_over

    def measure(self, layers: Sequence[MoE], log_every: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the entropies of ``layers`` from the records of steps.

        Gates that have one slot left cannot be harder. Raises ValueError if no entropy was recorded: the gates have
        none, or the objective leaves it out.
        """
        largest = sum(gate.largest_entropy for layer in layers for gate in layer.each_gate)
        for record in records:
            if record["step"] % log_every:
                continue
            if "entropy" not in record:
                raise ValueError("there is no entropy to measure: no gate has the auxiliary loss, or it is not counted")
            share = record["entropy"] / largest if largest else 0.0
            if math.isfinite(share):
                self.share, self._lowest = share, min(self._lowest, share)

    def state_dict(self) -> dict[str, float]:
        """Return what was measured; nothing before the first measurement."""
        return {} if self.share is None else {"share": self.share, "lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what was measured; what follows from it is decided by this window's own bounds."""
        self.share, self._lowest = state["share"], state["lowest"]
