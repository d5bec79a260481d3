"""Per-step numbers of all ranks, reduced a window of steps at a time with as few collectives as can be."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from dist_moe.engine.collectives import gather_objects
from dist_moe.parallel import job, sum_over_ranks
from dist_moe.recording import Recorder, Reduce

Sums = dict[str, Tensor | float | list[float]]
"""Numbers by name: tensors of any shape, or what the host knows already, of which no tensor is made step by step."""


class StepWindow:
    """Collects the numbers of steps; :meth:`reduce` reduces them over ranks.

    Sums have the same names, kinds and shapes in every step and on every rank. What was recorded may differ: a rank
    without tokens has nothing to record.
    """

    def __init__(self) -> None:
        self._tensors: list[dict[str, Tensor]] = []
        self._on_host: list[dict[str, float | list[float]]] = []
        self._recorded: list[Recorder] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def add(self, sums: Sums, recorded: Recorder | None = None) -> None:
        """Take in a step's sums and what was recorded in it."""
        self._tensors.append({name: value.detach() for name, value in sums.items() if isinstance(value, Tensor)})
        self._on_host.append({name: value for name, value in sums.items() if not isinstance(value, Tensor)})
        self._recorded.append(recorded or Recorder())

    def reduce(self) -> list[dict[str, Any]]:
        """Return one dict per collected step, of numbers and nested lists; empties the window.

        Collective if there are several ranks.
        """
        if not self._tensors:
            return []
        columns = {name: torch.stack([row[name] for row in self._tensors]) for name in self._tensors[0]}
        device = next(iter(columns.values())).device if columns else None
        for name in self._on_host[0]:
            columns[name] = torch.tensor([row[name] for row in self._on_host], dtype=torch.double, device=device)
        names = _names_of_all_ranks(self._recorded, device)
        recorded = {name: _column(self._recorded, name, reduce, device) for name, reduce in names}
        # A mean's value and count are sums; so is the count of a maximum, which says whether there was any.
        summed = {name: recorded[name] if reduce != "max" else recorded[name][:, 1:] for name, reduce in names}
        shapes = {name: column.shape[1:] for name, column in columns.items()}
        parts = (*columns.values(), *summed.values())
        sizes = [part.shape[1:].numel() for part in parts]
        flat = [part.double().view(len(part), size) for part, size in zip(parts, sizes, strict=True)]
        rows = sum_over_ranks(torch.cat(flat, dim=1)).cpu().split(sizes, dim=1)
        columns_of = list(zip(shapes.items(), rows, strict=False))
        records = [
            {name: of_step[i].view(shape).tolist() for (name, shape), of_step in columns_of}
            for i in range(len(self._tensors))
        ]
        largest = [recorded[name][:, 0] for name, reduce in names if reduce == "max"]
        maxima = iter(_max_over_ranks(torch.stack(largest)).cpu() if largest else ())
        for (name, reduce), row in zip(names, rows[len(shapes) :], strict=True):
            _add_recorded(records, name, reduce, row, next(maxima) if reduce == "max" else None)
        self._tensors, self._on_host, self._recorded = [], [], []
        return records


def _add_recorded(
    records: list[dict[str, Any]], name: str, reduce: Reduce, row: Tensor, maximum: Tensor | None
) -> None:
    """Put a recorded number into the records of the steps in which some rank recorded it."""
    for i, record in enumerate(records):
        count = float(row[i, -1])
        if count:
            value = float(row[i, 0] if maximum is None else maximum[i])
            record[name] = value / count if reduce == "mean" else value


def _column(recorded: list[Recorder], name: str, reduce: Reduce, device: torch.device | None) -> Tensor:
    """Return (steps, 2) fp64: value and count of each step; where there is none, the neutral value and 0."""
    absent = -torch.inf if reduce == "max" else 0.0
    rows = []
    for recorder in recorded:
        known = recorder.numbers.get(name)
        value = absent if known is None else known.value
        value = torch.as_tensor(value, dtype=torch.double, device=device).reshape(())
        rows.append(torch.stack([value, value.new_tensor(0.0 if known is None else known.count)]))
    return torch.stack(rows)


def _names_of_all_ranks(recorded: list[Recorder], device: torch.device | None) -> list[tuple[str, Reduce]]:
    """Return (name, reduce) of all that any rank recorded, in the same order on every rank.

    Ranks nearly always agree, which a digest of fixed size shows; the names themselves travel only if not.
    """
    mine = sorted({(name, number.reduce) for recorder in recorded for name, number in recorder.numbers.items()})
    world = job()
    if world.size == 1:
        return mine
    digest = hashlib.sha256(json.dumps(mine).encode()).digest()[:8]
    digests = world.gather(torch.tensor([int.from_bytes(digest, "big", signed=True)], device=device))
    if all(torch.equal(one, digests[0]) for one in digests):
        return mine
    return sorted({pair for of_rank in gather_objects(mine) for pair in of_rank})


def _max_over_ranks(x: Tensor) -> Tensor:
    return torch.stack(job().gather(x)).amax(dim=0)


def add_sums(sums: list[Sums]) -> Sums:
    """Return the element-wise sum of the numbers of several micro-batches."""
    if len(sums) == 1:
        return sums[0]
    return {name: _total([one[name] for one in sums]) for name in sums[0]}


def _total(parts: list[Any]) -> Tensor | float | list[float]:
    if isinstance(parts[0], Tensor):
        return torch.stack(parts).sum(dim=0)
    return [sum(column) for column in zip(*parts, strict=True)] if isinstance(parts[0], list) else sum(parts)
