"""The layer's times in the records of steps."""

from __future__ import annotations

from typing import Any

from dist_moe.parallel import PHASES

SUMS = "phase_seconds"
"""The name under which a step's times are summed over ranks; a list in the order of PHASES."""

FIGURES_OF_THE_MACHINE = frozenset({"examples_per_second", *(f"{phase}_seconds" for phase in PHASES)})
"""The figures of a record that are not the same when a run is done again."""


def is_timed(step: int, every: int) -> bool:
    """Whether step ``step`` (from 1) is one of those that are timed; ``every`` 0: none is."""
    return every > 0 and step % every == 0


def name_times(records: list[dict[str, Any]], num_ranks: int, every: int) -> None:
    """In the records of timed steps, the sums over ranks become means with a name each; in others they go."""
    for record in records:
        summed = record.pop(SUMS)
        if is_timed(record["step"], every):
            record |= {f"{phase}_seconds": total / num_ranks for phase, total in zip(PHASES, summed, strict=True)}
