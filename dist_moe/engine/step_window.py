"""Per-step numbers of all ranks, summed a window of steps at a time with one collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_moe.parallel import sum_over_ranks

Sums = dict[str, Tensor]


class StepWindow:
    """Collects named numbers step by step; :meth:`reduce` adds them up over ranks.

    Every step must bring the same names and shapes, on every rank.
    """

    def __init__(self) -> None:
        self._rows: list[Sums] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sums: Sums) -> None:
        self._rows.append({name: value.detach() for name, value in sums.items()})

    def reduce(self) -> list[dict[str, Any]]:
        """One dict per collected step, of numbers and nested lists; empties the window.

        Collective if there are several ranks.
        """
        if not self._rows:
            return []
        shapes = {name: value.shape for name, value in self._rows[-1].items()}
        columns = [torch.stack([row[name] for row in self._rows]).double() for name in shapes]
        rows = sum_over_ranks(torch.cat([column.view(len(column), -1) for column in columns], dim=1))
        self._rows = []
        sizes = [shape.numel() for shape in shapes.values()]
        return [
            {
                name: values.view(shape).tolist()
                for (name, shape), values in zip(shapes.items(), row.split(sizes), strict=True)
            }
            for row in rows.cpu()
        ]


def add_sums(sums: list[Sums]) -> Sums:
    """Element-wise sum of the numbers of several micro-batches."""
    if len(sums) == 1:
        return sums[0]
    return {name: torch.stack([one[name] for one in sums]).sum(dim=0) for name in sums[0]}
