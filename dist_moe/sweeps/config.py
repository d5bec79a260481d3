"""The sweep file: what is drawn, for which rows, how many trials of each."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dist_moe.config.packaged import config_path
from dist_moe.config.plain_yaml import read_yaml
from dist_moe.config.settings import Settings
from dist_moe.errors import UserError, shown
from dist_moe.sweeps.distributions import KINDS, Distribution
from dist_moe.sweeps.runner import OBJECTIVE

Space = dict[str, Distribution]


class RowConfig(Settings):
    """A row of the report: a variant of the base configuration with a search space of its own."""

    set: dict[str, Any] = Field(default_factory=dict, description="fields of this row, by dotted name")
    space: Space = Field(default_factory=dict, description="what is drawn for this row only, by dotted name")


class SweepConfig(Settings):
    """A sweep: ``trials`` draws for each of ``rows``."""

    config: Path = Field(
        description="the base run configuration: a file, relative to the sweep file, or @NAME for one of the package's"
    )
    trials: int = Field(ge=1, description="trials per row; may grow later")
    seed: int = Field(0, ge=0, description="seed of the draws")
    draws: Literal["own", "common"] = Field(
        "own", description="own: each row draws for itself; common: trial i of every row draws the same of a field"
    )
    seeds: int = Field(
        1,
        ge=1,
        description="runs of each draw, under the configuration's seed 0, 1, ...; with several, a row's draw is chosen "
        "by their mean validation loss, and rows are compared seed by seed",
    )
    compared: tuple[str, ...] = Field(
        (OBJECTIVE,), min_length=1, description="metrics of which the table has the differences between rows"
    )
    sampler: Literal["random", "tpe"] = Field(
        "random", description="random: the paper's, each draw a function of seed, row and trial; tpe: Optuna's TPE"
    )
    pruner: Literal["none", "median", "halving"] = Field(
        "none", description="whether trials that do badly on the way are stopped, and by which rule of Optuna's"
    )
    best_fraction: float = Field(0.05, gt=0, le=1, description="share of trials, best by validation loss, to report")
    trials_together: int = Field(1, ge=1, description="trials that one worker trains at once, stacked")
    set: dict[str, Any] = Field(default_factory=dict, description="fields of every row, by dotted name")
    space: Space = Field(default_factory=dict, description="what is drawn for every row, by dotted name")
    rows: dict[str, RowConfig] = Field(min_length=1, description="the rows of the report, by name")

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if self.trials % self.seeds:
            raise ValueError(f"trials={self.trials} is no multiple of seeds={self.seeds}, runs of each draw")
        if self.sampler == "tpe" and (self.seeds > 1 or self.draws == "common"):
            raise ValueError("sampler=tpe draws by what its own row has found: it takes no common draws and no seeds")
        return self


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file. ``config`` of the result is a path that can be opened from here.

    Raises UserError that names the file, the row and the key, the value and what is allowed.
    """
    try:
        sweep = SweepConfig.model_validate(read_yaml(path, "sweep"))
    except ValidationError as error:
        lines = [_explain(wrong) for wrong in error.errors()]
        raise UserError(f"sweep {path} is not valid:\n  " + "\n  ".join(lines)) from error
    return sweep.model_copy(update={"config": config_path(sweep.config, path.parent)})


def _explain(wrong: Any) -> str:
    place, message = _place(wrong["loc"]), wrong["msg"].removeprefix("Value error, ")
    if wrong["type"] == "missing":
        return f"{place}: required, but not given (a sweep file names a base 'config', 'trials' and 'rows')"
    if wrong["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(wrong["loc"][-1]), [*SweepConfig.model_fields], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{place}={shown(wrong['input'])}: there is no such field of a sweep{hint}"
    return f"{place}={shown(wrong['input'])}: {message[0].lower() + message[1:]}"


def _place(location: tuple[Any, ...]) -> str:
    """Return ("rows", "A", "space", "model.k", "uniform", "uniform", 0) as "row 'A', space, model.k, uniform.0"."""
    parts = [str(part) for part in location]
    names = []
    if parts[:1] == ["rows"] and len(parts) > 1:
        names.append(f"row {parts[1]!r}")
        parts = parts[2:]
    if parts[:1] in (["set"], ["space"]) and len(parts) > 1:
        names += parts[:2]
        parts = parts[2:]
        if parts[:1] and parts[0] in KINDS:
            parts = parts[1:] or parts
    return ", ".join([*names, ".".join(parts)] if parts else names)
