"""Per-step numbers of all ranks, summed a window of steps at a time with one collective."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.parallel import sum_over_ranks

Sums = dict[str, Tensor]


class StepWindow:
    """Collects named numbers step by step; :meth:`reduce` adds them up over ranks.

    Every step must bring the same names and shapes, on every rank.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._shapes: dict[str, torch.Size] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sums: Sums) -> None:
        self._shapes = {name: value.shape for name, value in sums.items()}
        self._rows.append(torch.cat([value.detach().double().flatten() for value in sums.values()]))

    def reduce(self) -> list[dict[str, float | list[float]]]:
        """One dict per collected step; empties the window. Collective if there are several ranks."""
        if not self._rows:
            return []
        rows = sum_over_ranks(torch.stack(self._rows))
        self._rows = []
        sizes = [shape.numel() for shape in self._shapes.values()]
        return [
            {
                name: values.item() if not shape else values.tolist()
                for (name, shape), values in zip(self._shapes.items(), row.split(sizes), strict=True)
            }
            for row in rows.cpu()
        ]


def add_sums(sums: list[Sums]) -> Sums:
    """Element-wise sum of the numbers of several micro-batches."""
    return {name: torch.stack([one[name] for one in sums]).sum(dim=0) for name in sums[0]}
