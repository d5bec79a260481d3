"""Per-step numbers of all ranks, reduced a window of steps at a time with as few collectives as can be."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from dist_moe.config.files import json_line
from dist_moe.parallel import PHASES, current_world, gather_objects, max_over_ranks, sum_over_ranks
from dist_moe.recording import Recorder, Reduce

Sums = dict[str, Tensor | float | list[float]]
"""Numbers by name: tensors of any shape, or what the host knows already, of which no tensor is made step by step."""

SUMS = "phase_seconds"
"""The name under which a step's times are summed over ranks; a list in the order of PHASES."""

MACHINE_METRICS = frozenset(
    {"examples_per_second", "tokens_per_second", "mfu", "peak_memory_gib"}
    | {f"{phase}_seconds" for phase in ("step", "data", *PHASES)}
)
"""The numbers of a record that differ when a run is done again."""


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
        maxima = iter(max_over_ranks(torch.stack(largest)).cpu() if largest else ())
        for (name, reduce), row in zip(names, rows[len(shapes) :], strict=True):
            values = next(maxima) if reduce == "max" else row[:, 0]
            for record, value, count in zip(records, values.tolist(), row[:, -1].tolist(), strict=True):
                if count:  # some rank recorded it in this step
                    record[name] = value / count if reduce == "mean" else value
        self._tensors, self._on_host, self._recorded = [], [], []
        return records


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
    world = current_world()
    if world.size == 1:
        return mine
    digest = hashlib.sha256(json_line(mine).encode()).digest()[:8]
    digests = world.gather(torch.tensor([int.from_bytes(digest, "big", signed=True)], device=device))
    if all(torch.equal(one, digests[0]) for one in digests):
        return mine
    return sorted({pair for of_rank in gather_objects(mine) for pair in of_rank})


def add_sums(sums: list[Sums]) -> Sums:
    """Return the element-wise sum of the numbers of several micro-batches."""

    def total(parts: list[Any]) -> Tensor | float | list[float]:
        if isinstance(parts[0], Tensor):
            return torch.stack(parts).sum(dim=0)
        return [sum(column) for column in zip(*parts, strict=True)] if isinstance(parts[0], list) else sum(parts)

    return sums[0] if len(sums) == 1 else {name: total([one[name] for one in sums]) for name in sums[0]}


def is_timed(step: int, every: int) -> bool:
    """Return whether step ``step`` (from 1) is one of those that are timed; ``every`` 0: none is."""
    return every > 0 and step % every == 0


def name_times(records: list[dict[str, Any]], num_ranks: int, every: int) -> None:
    """Turn the times of timed steps from sums over ranks into means with a name each; drop those of other steps."""
    for record in records:
        summed = record.pop(SUMS)
        if is_timed(record["step"], every):
            record |= {f"{phase}_seconds": total / num_ranks for phase, total in zip(PHASES, summed, strict=True)}
