"""Where ranks are: nodes, ranks of a node, and the groups over which experts are split."""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.errors import UserError


@dataclass(frozen=True)
class Layout:
    """``nodes`` of ``per_node`` ranks; experts are split over ``group`` consecutive ranks.

    Raises UserError where a group is neither a whole number of nodes nor an even part of one.
    """

    nodes: int
    per_node: int
    group: int

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("gpus", self.per_node), ("expert_parallel_size", self.group)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.ranks % self.group:
            raise UserError(
                f"parallel.expert_parallel_size={self.group} does not divide the {self.nodes} x {self.per_node} = "
                f"{self.ranks} rank(s) of --nodes x --gpus; choose one of {_divisors(self.ranks)}"
            )
        if self.group % self.per_node and self.per_node % self.group:
            raise UserError(
                f"parallel.expert_parallel_size={self.group} is neither a multiple nor a divisor of "
                f"--gpus={self.per_node}; choose one that is, so that groups are whole nodes or within a node"
            )

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.per_node

    @property
    def nodes_of_group(self) -> int:
        """Number of nodes over which a group is spread."""
        return max(1, self.group // self.per_node)

    @property
    def group_in_node(self) -> int:
        """Number of a group's ranks on one node."""
        return min(self.group, self.per_node)

    @property
    def copies(self) -> int:
        """Number of groups, each of which has all experts."""
        return self.ranks // self.group


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
