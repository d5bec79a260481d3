"""A sweep whose configurations have all been looked at: its rows, their draws, its identity."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.config.files import json_line, parse_json
from dist_moe.config.plain_yaml import read_yaml, yaml_text
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import load_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps.config import Space, SweepConfig, load_sweep
from dist_moe.sweeps.distributions import Stored
from dist_moe.tasks import TaskSettings

CORNER_LIMIT = 256
SHOWN_CHANGES = 3
_NOTHING = "nothing"
Draw = dict[str, Stored]


@dataclass(frozen=True)
class Row:
    """A row with what the sweep sets for all. ``assignments``: fields in the order of setting. ``common``: whether
    other rows draw the same. ``seeds``: trials of each draw, which differ in the configuration's seed."""

    name: str
    assignments: tuple[tuple[str, Any], ...]
    space: Space
    common: bool = False
    seeds: int = 1

    def draw(self, seed: int, index: int) -> Draw:
        """Return trial ``index``: a function of ``seed``, ``index`` and the row's name, whoever asks and when.

        In place of the row's name common draws depend on the field's.
        """
        number = index // self.seeds
        generator = _generator(seed, self.name, number)
        return {
            name: self.space[name].draw(_generator(seed, name, number) if self.common else generator)
            for name in sorted(self.space)
        }

    def values(self, draw: Draw, index: int = 0) -> dict[str, Any]:
        """Return fields of the configuration by dotted name, for the draw of trial ``index`` as the study stores it."""
        values = {name: self.space[name].value(stored) for name, stored in draw.items()}
        return values | ({"seed": index % self.seeds} if self.seeds > 1 else {})

    def config(self, base: Path, values: dict[str, Any]) -> SupervisedConfig:
        """Return the configuration of a trial. Raises UserError if it is not valid."""
        assignments = (*self.assignments, *values.items())
        overrides = [f"{name}={yaml_text(value, flow=True)}" for name, value in assignments]
        config = load_config(base, overrides)
        config.check(world_size=1)
        return config


@dataclass(frozen=True)
class SweepPlan:
    """``path``: the sweep file. ``base``: content of the base configuration when the plan was made. ``data``: what its
    trials learn from, by the content of that section."""

    path: Path
    sweep: SweepConfig
    rows: tuple[Row, ...]
    base: dict[str, Any]
    data: dict[str, TaskSettings] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return all on which a trial depends, flat: not ``trials``, which may grow, nor what only the report uses."""
        sweep = self.sweep.model_dump(mode="json", exclude={"config", "trials", "best_fraction", "compared"})
        return dict(_flat("base", self.base)) | dict(_flat("", sweep))


def plan_sweep(path: Path) -> SweepPlan:
    """Read a sweep file. Raises UserError if it is wrong, and for a row one of whose trials could not be trained."""
    sweep = load_sweep(path)
    rows = tuple(_row(path, sweep, name) for name in sweep.rows)
    data: dict[str, TaskSettings] = {}
    for row in rows:
        for values in _corners(row.space):
            try:
                section = row.config(sweep.config, values).data
            except UserError as error:
                drawn = ", ".join(f"{name}={value!r}" for name, value in values.items())
                raise UserError(f"sweep {path}: row {row.name!r} cannot be trained with {drawn}: {error}") from error
            content = section.model_dump(mode="json", exclude=set(section.places))
            data[json_line(content, sort_keys=True)] = section
    return SweepPlan(path, sweep, rows, read_yaml(sweep.config), data)


def _row(path: Path, sweep: SweepConfig, name: str) -> Row:
    """Return a row of its own fields and of those of the sweep that it does not set or draw itself."""
    own = sweep.rows[name]
    for where, fixed, space in ((f"row {name!r}", own.set, own.space), ("the sweep", sweep.set, sweep.space)):
        for key in fixed.keys() & space.keys():
            raise UserError(f"sweep {path}: {where} both sets and draws {key}; leave one out")
    shared_space = {key: drawn for key, drawn in sweep.space.items() if key not in own.set}
    shared_set = {key: value for key, value in sweep.set.items() if key not in own.space}
    assignments = (*shared_set.items(), *own.set.items())
    row = Row(name, assignments, shared_space | own.space, sweep.draws == "common", sweep.seeds)
    if sweep.seeds > 1 and "seed" in (*dict(assignments), *row.space):
        raise UserError(f"sweep {path}: row {name!r} sets or draws seed, and seeds={sweep.seeds} does; leave one out")
    if not row.space and sweep.trials > sweep.seeds:
        remedy = "give it a space" + (f", or trials={sweep.seeds}, one for each seed" if sweep.seeds > 1 else "")
        raise UserError(f"sweep {path}: row {name!r} draws nothing, so that its trials would be the same; {remedy}")
    names = [*(key for key, _ in row.assignments), *row.space]
    for section, key in itertools.product(row.space, names):
        if key.startswith(f"{section}."):
            raise UserError(f"sweep {path}: row {name!r}: drawing {section} as a whole overwrites {key}")
    return row


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Yield all combinations of extreme values and choices; where they are too many, each value at least once."""
    extremes = {name: drawn.extremes() for name, drawn in space.items()}
    if np.prod([len(values) for values in extremes.values()], dtype=float) <= CORNER_LIMIT:
        for combination in itertools.product(*extremes.values()):
            yield dict(zip(extremes, combination, strict=True))
        return
    for i in range(max(len(values) for values in extremes.values())):
        yield {name: values[i % len(values)] for name, values in extremes.items()}
    for name, values in extremes.items():
        first = {other: others[0] for other, others in extremes.items()}
        yield from (first | {name: value} for value in values)


def _generator(seed: int, name: str, number: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, key, number])


def _flat(prefix: str, content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from _flat(f"{prefix}/{name}" if prefix else str(name), value)
    else:
        yield prefix, content


def digest(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of settings, whatever the order of their fields."""
    return hashlib.sha256(json_line(settings, sort_keys=True).encode()).hexdigest()


def check_unchanged(plan: SweepPlan, directory: Path, attributes: dict[str, Any]) -> None:
    """Raise UserError if a study with these attributes belongs to another sweep than ``plan``.

    ``trials`` may have grown, and ``best_fraction`` and ``compared`` may be others; nothing else may have changed,
    since old and new trials would be reported as one sample.
    """
    remedy = f"put it back as it was, or name another directory by --sweep-dir (this one is {directory})"
    settings = plan.settings()
    if "digest" in attributes and attributes["digest"] != digest(settings):
        changes = "; ".join(_changes(attributes["settings"], parse_json(json_line(settings))))
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
        for name in names[:SHOWN_CHANGES]
    ]
    more = len(names) - len(shown)
    return [*shown, f"and {more} more"] if more else shown
