"""Placement: expert -> (rank, local index). Chosen for speed; changing it never changes the function."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dist_moe.parallel.world import World


@dataclass(frozen=True)
class Placement:
    """Places of E experts on ``num_ranks`` ranks, the same number on each.

    ``expert_of_position``: (E,) global ids in the order of the positions; position p is the place
    p % (E / num_ranks) of rank p // (E / num_ranks). ``is_identity``: whether every rank has contiguous ids, in order.

    Raises ValueError unless it is a permutation of 0..E-1 that the ranks can share equally.
    """

    expert_of_position: tuple[int, ...]
    num_ranks: int
    is_identity: bool = field(init=False, compare=False, repr=False)  # asked for in every step

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_of_position", tuple(map(int, self.expert_of_position)))
        if self.num_ranks < 1 or not self.num_experts or self.num_experts % self.num_ranks:
            raise ValueError(
                f"num_experts={self.num_experts} is not divisible by the {self.num_ranks} ranks of its world"
            )
        if sorted(self.expert_of_position) != list(range(self.num_experts)):
            raise ValueError(
                f"a placement must name each expert 0..{self.num_experts - 1} once, got {list(self.expert_of_position)}"
            )
        object.__setattr__(self, "is_identity", self.expert_of_position == tuple(range(self.num_experts)))

    @classmethod
    def identity(cls, num_experts: int, num_ranks: int) -> Placement:
        """Return contiguous ids: rank r has the experts r * E / R .. (r + 1) * E / R - 1."""
        return cls(tuple(range(num_experts)), num_ranks)

    @property
    def num_experts(self) -> int:
        """Number of experts over all ranks, E."""
        return len(self.expert_of_position)

    @property
    def experts_per_rank(self) -> int:
        """Number of experts on each rank."""
        return self.num_experts // self.num_ranks

    @cached_property
    def position_of_expert(self) -> tuple[int, ...]:
        """Position of each expert, (E,): the inverse of ``expert_of_position``."""
        return tuple(sorted(range(self.num_experts), key=self.expert_of_position.__getitem__))

    def rank_of(self, expert: int) -> int:
        """Return the rank on which ``expert`` lives."""
        return self.position_of_expert[expert] // self.experts_per_rank

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the global ids of the experts on ``rank``, in the order of their local indices."""
        return self.expert_of_position[rank * self.experts_per_rank : (rank + 1) * self.experts_per_rank]

    def moved_to(self, other: Placement) -> tuple[int, ...]:
        """Return the experts whose rank differs in ``other``, ascending."""
        return tuple(e for e in range(self.num_experts) if self.rank_of(e) != other.rank_of(e))

    @property
    def digest(self) -> str:
        """A hash, equal exactly for equal placements; for ranks to compare."""
        content = f"{self.num_ranks}:{','.join(map(str, self.expert_of_position))}"
        return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=64)
def position_table(placement: Placement, device: torch.device) -> Tensor:
    """Return ``position_of_expert`` as an (E,) int64 tensor on ``device``, copied there once."""
    return torch.tensor(placement.position_of_expert, device=device)


@lru_cache(maxsize=64)
def expert_table(placement: Placement, device: torch.device) -> Tensor:
    """Return ``expert_of_position`` as an (E,) int64 tensor on ``device``, copied there once."""
    return torch.tensor(placement.expert_of_position, device=device)


def experts_of_rank(num_experts: int, world: World) -> range:
    """Return the global ids of the experts that live on this rank: contiguous, the same number on each rank.

    Raises ValueError when ``num_experts`` is not divisible by the size of the world.
    """
    ids = Placement.identity(num_experts, world.size).experts_of(world.rank)
    return range(ids[0], ids[-1] + 1)
