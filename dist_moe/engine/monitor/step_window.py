"""Per-step numbers of all ranks, summed a window of steps at a time with one collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_moe.parallel import sum_over_ranks

Sums = dict[str, Tensor | float | list[float]]
"""Numbers by name: tensors of any shape, or what the host knows already, of which no tensor is made step by step."""


class StepWindow:
    """Collects named numbers step by step; :meth:`reduce` adds them up over ranks.

    Every step must bring the same names, kinds and shapes, on every rank.
    """

    def __init__(self) -> None:
        self._tensors: list[dict[str, Tensor]] = []
        self._on_host: list[dict[str, float | list[float]]] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def add(self, sums: Sums) -> None:
        self._tensors.append({name: value.detach() for name, value in sums.items() if isinstance(value, Tensor)})
        self._on_host.append({name: value for name, value in sums.items() if not isinstance(value, Tensor)})

    def reduce(self) -> list[dict[str, Any]]:
        """One dict per collected step, of numbers and nested lists; empties the window.

        Collective if there are several ranks.
        """
        if not self._tensors:
            return []
        columns = {name: torch.stack([row[name] for row in self._tensors]) for name in self._tensors[0]}
        device = next(iter(columns.values())).device if columns else None
        for name in self._on_host[0]:
            columns[name] = torch.tensor([row[name] for row in self._on_host], dtype=torch.double, device=device)
        shapes = {name: column.shape[1:] for name, column in columns.items()}
        sizes = [shape.numel() for shape in shapes.values()]
        flat = [column.double().view(-1, size) for column, size in zip(columns.values(), sizes, strict=True) if size]
        rows = sum_over_ranks(torch.cat(flat, dim=1))
        self._tensors, self._on_host = [], []
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
    return {name: _total([one[name] for one in sums]) for name in sums[0]}


def _total(parts: list[Any]) -> Tensor | float | list[float]:
    if isinstance(parts[0], Tensor):
        return torch.stack(parts).sum(dim=0)
    return [sum(column) for column in zip(*parts, strict=True)] if isinstance(parts[0], list) else sum(parts)
