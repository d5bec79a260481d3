"""A sweep whose configurations have all been looked at: its rows, their draws, its identity."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dist_moe.config.overrides import read_yaml
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import load_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps.config import Space, SweepConfig, load_sweep
from dist_moe.sweeps.distributions import Stored

MOST_CORNERS = 256
Draw = dict[str, Stored]


@dataclass(frozen=True)
class Row:
    """A row with what the sweep sets for all. ``assignments``: fields in the order of setting."""

    name: str
    assignments: tuple[tuple[str, Any], ...]
    space: Space

    def draw(self, seed: int, index: int) -> Draw:
        """Trial ``index``: a function of ``seed``, the row's name and ``index`` alone, whoever asks and when."""
        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        generator = np.random.default_rng([seed, key, index])
        return {name: self.space[name].draw(generator) for name in sorted(self.space)}

    def values(self, draw: Draw) -> dict[str, Any]:
        """What the configuration gets for a draw as the study stores it."""
        return {name: self.space[name].value(stored) for name, stored in draw.items()}

    def config(self, base: Path, values: dict[str, Any]) -> SupervisedConfig:
        """The configuration of a trial; UserError if it is not valid."""
        overrides = [_override(name, value) for name, value in (*self.assignments, *values.items())]
        config = load_config(base, overrides)
        config.check(world_size=1)
        return config


@dataclass(frozen=True)
class SweepPlan:
    """``path``: the sweep file. ``base``: content of the base configuration when the plan was made."""

    path: Path
    sweep: SweepConfig
    rows: tuple[Row, ...]
    base: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """All on which a trial depends, flat: not ``trials``, which may grow, nor what only the report asks for."""
        sweep = self.sweep.model_dump(mode="json", exclude={"config", "trials", "best_fraction"})
        return dict(_flat("base", self.base)) | dict(_flat("", sweep))


def plan_sweep(path: Path) -> SweepPlan:
    """Raises UserError for a wrong sweep file, and for a row one of whose trials could not be trained."""
    sweep = load_sweep(path)
    rows = tuple(_row(path, sweep, name) for name in sweep.rows)
    for row in rows:
        _check_corners(path, sweep.config, row)
    return SweepPlan(path, sweep, rows, read_yaml(sweep.config))


def _row(path: Path, sweep: SweepConfig, name: str) -> Row:
    """What a row says goes before what the sweep says of the same field."""
    own = sweep.rows[name]
    for where, fixed, space in ((f"row {name!r}", own.set, own.space), ("the sweep", sweep.set, sweep.space)):
        for key in fixed.keys() & space.keys():
            raise UserError(f"sweep {path}: {where} both sets and draws {key}; leave one out")
    shared_space = {key: drawn for key, drawn in sweep.space.items() if key not in own.set}
    shared_set = {key: value for key, value in sweep.set.items() if key not in own.space}
    row = Row(name, (*shared_set.items(), *own.set.items()), shared_space | own.space)
    _check_keys(path, row)
    return row


def _check_keys(path: Path, row: Row) -> None:
    if not row.space:
        raise UserError(
            f"sweep {path}: row {row.name!r} draws nothing, so that all its trials would be the same; give it a space"
        )
    names = [*(key for key, _ in row.assignments), *row.space]
    for section, key in itertools.product(row.space, names):
        if key.startswith(f"{section}."):
            raise UserError(f"sweep {path}: row {row.name!r}: drawing {section} as a whole overwrites {key}")


def _check_corners(path: Path, base: Path, row: Row) -> None:
    for values in _corners(row.space):
        try:
            row.config(base, values)
        except UserError as error:
            drawn = ", ".join(f"{name}={value!r}" for name, value in values.items())
            raise UserError(f"sweep {path}: row {row.name!r} cannot be trained with {drawn}: {error}") from error


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """All combinations of extreme values and choices; where they are too many, each value at least once."""
    extremes = {name: drawn.extremes() for name, drawn in space.items()}
    if np.prod([len(values) for values in extremes.values()], dtype=float) <= MOST_CORNERS:
        for combination in itertools.product(*extremes.values()):
            yield dict(zip(extremes, combination, strict=True))
        return
    for i in range(max(len(values) for values in extremes.values())):
        yield {name: values[i % len(values)] for name, values in extremes.items()}
    for name, values in extremes.items():
        first = {other: others[0] for other, others in extremes.items()}
        yield from (first | {name: value} for value in values)


def _override(name: str, value: Any) -> str:
    return f"{name}={yaml.safe_dump(value, default_flow_style=True)}"


def _flat(prefix: str, content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from _flat(f"{prefix}/{name}" if prefix else str(name), value)
    else:
        yield prefix, content
