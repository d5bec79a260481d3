"""What every bank of experts is: stacked weights of some of the experts, known by global id."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_moe import kernels


class ExpertBank(nn.Module, ABC):
    """The experts ``expert_ids`` out of ``num_experts``; axis 0 of every parameter is the expert.

    ``expert_ids``: distinct global ids of the experts that this bank holds, in the order of axis 0.
    ``dim``, ``out_dim``: width of the rows it takes and of those it gives.
    """

    def __init__(self, dim: int, out_dim: int, num_experts: int, expert_ids: Sequence[int]) -> None:
        super().__init__()
        if not expert_ids or len(set(expert_ids)) < len(expert_ids):
            raise ValueError(f"expert_ids must be distinct and not empty, got {list(expert_ids)}")
        if not 0 <= min(expert_ids) <= max(expert_ids) < num_experts:
            raise ValueError(f"expert_ids must lie in 0..{num_experts - 1}, got {list(expert_ids)}")
        self.dim = dim
        self.out_dim = out_dim
        self.num_experts = num_experts
        self.expert_ids = tuple(expert_ids)

    @property
    def num_local_experts(self) -> int:
        return len(self.expert_ids)

    @abstractmethod
    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """(N, dim) rows sorted by local expert, and their counts (on an accelerator a tensor) -> (N, out_dim)."""

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """(T, dim) rows -> (E_local, T, out_dim): every local expert on every row, T may be 0.

        Banks override this with something faster, without loops over counts, so that ``torch.vmap``
        over stacked parameters works (``randomness="different"`` where the experts drop out).
        """
        experts, rows = self.num_local_experts, len(x_TD)
        return self(x_TD.repeat(experts, 1), [rows] * experts).unflatten(0, (experts, rows))

    def generators(self) -> list[torch.Generator]:
        """One generator per local expert, for an initialisation that does not depend on the layout.

        Takes a single draw from torch's global generator, whatever the number of local experts.
        """
        base = int(torch.randint(2**62, (), device="cpu").item())
        return [torch.Generator().manual_seed((base + 0x9E3779B97F4A7C15 * e) % 2**63) for e in self.expert_ids]
