"""For tools/random_faults.py: named under ``imports``, it lets a run tell each phase that it enters.

Writes the phase to PHASE_MARKS/rank-RANK, so that a kill can be aimed at it.
"""

from __future__ import annotations

import os
from pathlib import Path

from dist_moe.engine.health.heartbeats import Activity

_FILE = Path(os.environ["PHASE_MARKS"]) / f"rank-{os.environ.get('RANK', '0')}" if "PHASE_MARKS" in os.environ else None
_enter = Activity.enter


def _enter_and_tell(self: Activity, phase: str, step: int | None = None) -> None:
    if _FILE is not None and (phase != self.phase or step is not None):
        _FILE.write_text(phase, encoding="utf-8")
    _enter(self, phase, step)


Activity.enter = _enter_and_tell  # type: ignore[method-assign]
