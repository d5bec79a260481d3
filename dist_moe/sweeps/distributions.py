"""Distributions of hyper-parameters, as a sweep file writes them: ``{log_uniform: [5.0e-5, 5.0e-4]}``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Discriminator, Field, StrictInt, Tag, model_validator

from dist_moe.config.files import json_line
from dist_moe.config.settings import Settings

Stored = bool | int | float | str | None


class Drawn(Settings, ABC):
    """One hyper-parameter. A value is *stored* in the study as a scalar that Optuna can hold."""

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Stored:
        """Return one stored value."""

    @abstractmethod
    def optuna(self) -> BaseDistribution:
        """Return the distribution for Optuna's own samplers."""

    @abstractmethod
    def extremes(self) -> list[Any]:
        """Return values (not stored ones) such that, if these are all allowed, any is."""

    def value(self, stored: Stored) -> Any:
        """Return what the configuration gets for a stored value."""
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
        """Return a choice, as it is stored."""
        return _store(self.choice[int(generator.integers(len(self.choice)))])

    def optuna(self) -> BaseDistribution:
        """Return the categories, as they are stored."""
        return CategoricalDistribution([_store(value) for value in self.choice])

    def extremes(self) -> list[Any]:
        """Return all choices."""
        return self.choice

    def value(self, stored: Stored) -> Any:
        """Return the choice that was stored."""
        return next(value for value in self.choice if _store(value) == stored)


Ends = tuple[float, float]
WholeEnds = tuple[StrictInt, StrictInt]


class Between(Drawn):
    """A number between two ends, which are the only field. ``log``: evenly in its logarithm, the ends are positive."""

    log: ClassVar[bool] = False

    @property
    def ends(self) -> Any:
        """The lowest and the highest value."""
        return next(iter(vars(self).values()))

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.ends
        if not low < high:
            raise ValueError(f"the lowest value {low} must be below the highest, {high}; for one value use set")
        if self.log and low <= 0:
            raise ValueError(f"the lowest value {low} must be positive, for its logarithm is taken")
        return self

    def optuna(self) -> BaseDistribution:
        """Return the distribution over floats, or over whole numbers where the ends are whole."""
        low, high = self.ends
        return (IntDistribution if isinstance(low, int) else FloatDistribution)(low, high, log=self.log)

    def extremes(self) -> list[Any]:
        """Return both ends."""
        return list(self.ends)


class Uniform(Between):
    """A number between two ends, evenly."""

    uniform: Ends = Field(description="lowest and highest value")

    def draw(self, generator: np.random.Generator) -> Stored:
        """Return a float."""
        return float(generator.uniform(*self.uniform))


class LogUniform(Between):
    """A number between two positive ends, evenly in its logarithm."""

    log: ClassVar[bool] = True
    log_uniform: Ends = Field(description="lowest and highest value, both positive")

    def draw(self, generator: np.random.Generator) -> Stored:
        """Return a float, within the ends whatever the rounding."""
        low, high = self.log_uniform
        return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)


class IntUniform(Between):
    """A whole number between two ends, both included, each equally likely."""

    int_uniform: WholeEnds = Field(description="lowest and highest value, whole numbers")

    def draw(self, generator: np.random.Generator) -> Stored:
        """Return an int."""
        low, high = self.int_uniform
        return int(generator.integers(low, high, endpoint=True))


class IntLogUniform(Between):
    """A whole number between two positive ends, both included: a log-uniform number in
    [low - 1/2, high + 1/2], rounded."""

    log: ClassVar[bool] = True
    int_log_uniform: WholeEnds = Field(description="lowest and highest value, positive whole numbers")

    def draw(self, generator: np.random.Generator) -> Stored:
        """Return an int."""
        low, high = self.int_log_uniform
        number = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(number), low), high)


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


def _store(value: Any) -> Stored:
    """Return ``value`` if Optuna can hold it, which is so for scalars, else JSON."""
    return value if isinstance(value, Stored) else json_line(value, sort_keys=True)
