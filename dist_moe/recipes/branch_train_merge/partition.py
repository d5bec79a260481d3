"""The division of a text among branches: by the domains that the data name, or at random.

To add a way: derive from :class:`PartitionSettings` and register it, here or in a module under ``imports``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny

from dist_moe.config.registry import Registry
from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.data.prepared import PARTS
from dist_moe.errors import UserError
from dist_moe.tasks.language import LanguageModelTask

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """Which branch learns which sequences.

    ``branches``: their names. ``branch_of``: by part of the data (N,) int64, the branch of each sequence, -1 for those
    of domains that are held out. ``trained_on``: the domains of the data that branches learn; all others are held out.
    """

    branches: tuple[str, ...]
    branch_of: Mapping[str, Rows]
    trained_on: tuple[str, ...]

    def task_of(self, task: LanguageModelTask, branch: str | None) -> LanguageModelTask:
        """Return the task of one branch's sequences, or of all branches' if None."""
        chosen = None if branch is None else self.branches.index(branch)
        return task_of_rows(task, {part: _rows_of(of_N, chosen) for part, of_N in self.branch_of.items()})


def _rows_of(branch_N: Rows, chosen: int | None) -> Rows:
    return np.flatnonzero(branch_N >= 0 if chosen is None else branch_N == chosen)


def task_of_rows(task: LanguageModelTask, rows: Mapping[str, Rows]) -> LanguageModelTask:
    """Return the task of some sequences of each part; vocabulary and counts stay those of the whole text."""
    tables: Mapping[str, Any] = {part: getattr(task.data, part).select(row_N) for part, row_N in rows.items()}
    return LanguageModelTask(replace(task.data, **tables))


def task_of_domain(task: LanguageModelTask, domain: str) -> LanguageModelTask:
    """Return the task of the sequences of one of the data's domains."""
    number = task.data.domains.index(domain)
    return task_of_rows(task, {part: np.flatnonzero(getattr(task.data, part).domain_N == number) for part in PARTS})


class PartitionSettings(Settings, ABC):
    """The section ``recipe.partition``: which text each branch learns."""

    name: str
    domains: tuple[str, ...] | None = Field(
        None, min_length=1, description="domains of the data to train on; all others are held out (null: train on all)"
    )

    @abstractmethod
    def divide(self, task: LanguageModelTask) -> Partition:
        """Return the division of the task's sequences. Raises UserError if they cannot be divided so."""

    def trained_on(self, task: LanguageModelTask) -> tuple[str, ...]:
        """Return the domains to train on, in the data's order. Raises UserError for one that the data do not have."""
        known = task.data.domains
        for name in self.domains or ():
            if name not in known:
                raise UserError(f"recipe.partition.domains: there is no domain {name}; there are {', '.join(known)}")
        return tuple(name for name in known if self.domains is None or name in self.domains)

    def is_trained_on(self, task: LanguageModelTask, part: str) -> NDArray[np.bool_]:
        """Return (N,) whether each sequence of a part is of a domain to train on."""
        numbers = [task.data.domains.index(name) for name in self.trained_on(task)]
        found: NDArray[np.bool_] = np.isin(getattr(task.data, part).domain_N, numbers)
        return found


PARTITIONS = Registry("partition", PartitionSettings, default="provenance")

PartitionConfig = Annotated[SerializeAsAny[PartitionSettings], PARTITIONS]
"""The type of a configuration field that holds any registered partition."""


@PARTITIONS.register
class Provenance(PartitionSettings):
    """A branch for each domain of the data."""

    name: Literal["provenance"] = Field("provenance", description="a branch for each domain that the data name")

    def divide(self, task: LanguageModelTask) -> Partition:
        """Return the division by the data's own domains."""
        trained_on = self.trained_on(task)
        branch_of_D = np.full(len(task.data.domains), -1, dtype=np.int64)
        for branch, name in enumerate(trained_on):
            branch_of_D[task.data.domains.index(name)] = branch
        branch_of = {part: branch_of_D[getattr(task.data, part).domain_N] for part in PARTS}
        return Partition(trained_on, branch_of, trained_on)


@PARTITIONS.register
class RandomSplit(PartitionSettings):
    """Branches of equal size whose sequences are drawn at random: what specialists must beat."""

    name: Literal["random"] = Field("random", description="equal shares drawn at random, whatever the domain")
    branches: int = Field(8, ge=1, le=LARGEST_COUNT, description="number of branches")
    seed: int = Field(0, ge=0, description="seed of the draw")

    def divide(self, task: LanguageModelTask) -> Partition:
        """Return a division in which the sizes of branches differ by one sequence at most."""
        branch_of = {}
        for number, part in enumerate(PARTS):
            row_N = np.flatnonzero(self.is_trained_on(task, part))
            order_N = np.random.default_rng((self.seed, number)).permutation(row_N)
            branch_of[part] = np.full(len(getattr(task.data, part)), -1, dtype=np.int64)
            branch_of[part][order_N] = np.arange(len(order_N)) % self.branches
        names = tuple(f"random-{branch}" for branch in range(self.branches))
        return Partition(names, branch_of, self.trained_on(task))
