"""Whether the studies in a directory are those of this sweep file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError
from dist_moe.sweeps.plan import SweepPlan

MOST_CHANGES_SHOWN = 3
_NOTHING = "nothing"


def digest(settings: dict[str, Any]) -> str:
    """The same for settings that are the same, in whatever order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_unchanged(plan: SweepPlan, directory: Path, attributes: dict[str, Any]) -> None:
    """Raise UserError if a study with these attributes belongs to another sweep than ``plan``.

    ``trials`` may have grown, and ``best_fraction`` may be another; nothing else may have changed, since old
    and new trials would be reported as one sample.
    """
    remedy = f"put it back as it was, or name another directory by --sweep-dir (this one is {directory})"
    settings = plan.settings()
    if "digest" in attributes and attributes["digest"] != digest(settings):
        changes = "; ".join(_changes(attributes["settings"], json.loads(json.dumps(settings))))
        raise UserError(f"sweep {plan.path} is not what it was when its trials began: {changes}. {remedy.capitalize()}")
    if attributes.get("trials", 0) > plan.sweep.trials:
        raise UserError(
            f"sweep {plan.path}: trials={plan.sweep.trials} is less than the {attributes['trials']} with which "
            f"it began; {remedy}"
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in (before | now) if before.get(name, _NOTHING) != now.get(name, _NOTHING)]
    shown = [
        f"{name.replace('/', ', ')} was {before.get(name, _NOTHING)!r} and is {now.get(name, _NOTHING)!r}"
        for name in names[:MOST_CHANGES_SHOWN]
    ]
    more = len(names) - len(shown)
    return [*shown, f"and {more} more"] if more else shown
