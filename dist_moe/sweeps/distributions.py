"""What a hyper-parameter is drawn from, as a sweep file writes it: ``{log_uniform: [5.0e-5, 5.0e-4]}``."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Discriminator, Field, StrictInt, Tag, model_validator

from dist_moe.config.settings import Settings

Stored = bool | int | float | str | None


class Drawn(Settings, ABC):
    """One hyper-parameter. A value is *stored* in the study as a scalar that Optuna can hold."""

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Stored:
        """One stored value."""

    @abstractmethod
    def optuna(self) -> BaseDistribution:
        """The same for Optuna's own samplers."""

    @abstractmethod
    def extremes(self) -> list[Any]:
        """Values (not stored ones) such that, if these are all allowed, any is."""

    def value(self, stored: Stored) -> Any:
        """What the configuration gets for a stored value."""
        return stored


class Choice(Drawn):
    """One of the listed values, each equally likely; a value may be a whole section."""

    choice: list[Any] = Field(min_length=1, description="the values, of any kind that the field takes")

    @model_validator(mode="after")
    def _differ(self) -> Choice:
        # Optuna finds a choice by ==, for which True is 1.
        stored = [_store(value) for value in self.choice]
        for i, value in enumerate(self.choice):
            if stored[i] in stored[:i]:
                raise ValueError(f"the value {value!r} is listed twice")
        return self

    def draw(self, generator: np.random.Generator) -> Stored:
        return _store(self.choice[int(generator.integers(len(self.choice)))])

    def optuna(self) -> BaseDistribution:
        return CategoricalDistribution([_store(value) for value in self.choice])

    def extremes(self) -> list[Any]:
        return self.choice

    def value(self, stored: Stored) -> Any:
        return next(value for value in self.choice if _store(value) == stored)


Ends = tuple[float, float]
WholeEnds = tuple[StrictInt, StrictInt]


class Uniform(Drawn):
    """A number between two ends, evenly."""

    uniform: Ends = Field(description="lowest and highest value")

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _check_ends(self.uniform)
        return self

    def draw(self, generator: np.random.Generator) -> Stored:
        return float(generator.uniform(*self.uniform))

    def optuna(self) -> BaseDistribution:
        return FloatDistribution(*self.uniform)

    def extremes(self) -> list[Any]:
        return list(self.uniform)


class LogUniform(Drawn):
    """A number between two positive ends, evenly in its logarithm."""

    log_uniform: Ends = Field(description="lowest and highest value, both positive")

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        _check_ends(self.log_uniform, positive=True)
        return self

    def draw(self, generator: np.random.Generator) -> Stored:
        low, high = self.log_uniform
        return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)

    def optuna(self) -> BaseDistribution:
        return FloatDistribution(*self.log_uniform, log=True)

    def extremes(self) -> list[Any]:
        return list(self.log_uniform)


class IntUniform(Drawn):
    """A whole number between two ends, both included, each equally likely."""

    int_uniform: WholeEnds = Field(description="lowest and highest value, whole numbers")

    @model_validator(mode="after")
    def _ordered(self) -> IntUniform:
        _check_ends(self.int_uniform)
        return self

    def draw(self, generator: np.random.Generator) -> Stored:
        low, high = self.int_uniform
        return int(generator.integers(low, high, endpoint=True))

    def optuna(self) -> BaseDistribution:
        return IntDistribution(*self.int_uniform)

    def extremes(self) -> list[Any]:
        return list(self.int_uniform)


class IntLogUniform(Drawn):
    """A whole number between two positive ends, both included: a log-uniform number in
    [low - 1/2, high + 1/2], rounded."""

    int_log_uniform: WholeEnds = Field(description="lowest and highest value, positive whole numbers")

    @model_validator(mode="after")
    def _ordered(self) -> IntLogUniform:
        _check_ends(self.int_log_uniform, positive=True)
        return self

    def draw(self, generator: np.random.Generator) -> Stored:
        low, high = self.int_log_uniform
        number = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(number), low), high)

    def optuna(self) -> BaseDistribution:
        return IntDistribution(*self.int_log_uniform, log=True)

    def extremes(self) -> list[Any]:
        return list(self.int_log_uniform)


KINDS: dict[str, type[Drawn]] = {
    "choice": Choice,
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "int_uniform": IntUniform,
    "int_log_uniform": IntLogUniform,
}


def _kind_of(content: Any) -> str | None:
    if isinstance(content, Drawn):
        return next(name for name, kind in KINDS.items() if type(content) is kind)
    if isinstance(content, dict) and len(content) == 1:
        return next((name for name in content if name in KINDS), None)
    return None


Distribution = Annotated[
    Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("log_uniform")]
    | Annotated[IntUniform, Tag("int_uniform")]
    | Annotated[IntLogUniform, Tag("int_log_uniform")],
    Discriminator(
        _kind_of,
        custom_error_type="no_distribution",
        custom_error_message=f"give one of {{{', '.join(KINDS)}}} with its values, for example {{uniform: [0, 1]}}",
    ),
]


def _check_ends(ends: tuple[float, float], positive: bool = False) -> None:
    low, high = ends
    if not low < high:
        raise ValueError(f"the lowest value {low} must be below the highest, {high}; for one value use set")
    if positive and low <= 0:
        raise ValueError(f"the lowest value {low} must be positive, for its logarithm is taken")


def _store(value: Any) -> Stored:
    """Optuna holds scalars; anything else goes as JSON."""
    if isinstance(value, Stored):
        return value
    return json.dumps(value, sort_keys=True)
