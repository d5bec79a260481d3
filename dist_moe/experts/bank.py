"""Banks of experts, stacked weights of some of the experts by global id, and the settings that build them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import Settings


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
        """Number of experts that this bank holds."""
        return len(self.expert_ids)

    @property
    def parameters_per_expert(self) -> int:
        """Number of parameters of one expert."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    @property
    def flops_per_row(self) -> float:
        """FLOPs of one row's forward pass, a multiplication and an addition counting as two.

        Products alone. By default every weight with more than one axis of its own is multiplied once a row.
        """
        return 2.0 * sum(parameter[0].numel() for parameter in self.parameters() if parameter.dim() > 2)

    @property
    def kept_per_row(self) -> int:
        """Numbers that one row leaves for the backward pass, beside the row and its result: for plans, an estimate.

        By default a result for each matrix (parameters of three axes); ``dim`` for a bank without matrices.
        """
        return self._widths

    @property
    def accesses_per_row(self) -> float:
        """Numbers that elementwise operations of one row read and write, forward and backward: an estimate.

        By default the numbers of :attr:`kept_per_row`'s default, each read and written forward, read twice and written
        backward.
        """
        return 5.0 * self._widths

    @property
    def _widths(self) -> int:
        return sum(parameter.shape[2] for parameter in self.parameters() if parameter.dim() == 3) or self.dim

    @abstractmethod
    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return (N, out_dim) for (N, dim) rows sorted by local expert and their counts, on an accelerator a tensor."""

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return (E_local, T, out_dim): every local expert on every one of (T, dim) rows, T may be 0.

        Banks override this with something faster, without loops over counts, so that ``torch.vmap``
        over stacked parameters works (``randomness="different"`` where the experts drop out).
        """
        experts, rows = self.num_local_experts, len(x_TD)
        return self(x_TD.repeat(experts, 1), [rows] * experts).unflatten(0, (experts, rows))

    def generators(self) -> list[torch.Generator]:
        """Return one generator per local expert, for an initialisation that does not depend on the layout.

        Takes a single draw from torch's global generator, whatever the number of local experts.
        """
        base = int(torch.randint(2**62, (), device="cpu").item())
        if torch.get_default_device().type == "meta":
            return [torch.Generator()] * self.num_local_experts  # nothing is drawn from them
        return [torch.Generator().manual_seed((base + 0x9E3779B97F4A7C15 * e) % 2**63) for e in self.expert_ids]


def drawn(shape: tuple[int, ...], generators: Sequence[torch.Generator], std: float | None = None) -> nn.Parameter:
    """Return (E_local, *shape) from N(0, std), or glorot-uniform where there is no ``std``; a generator per expert."""
    if torch.get_default_device().type == "meta":
        return nn.Parameter(torch.empty(len(generators), *shape))
    weights = [torch.empty(shape) for _ in generators]
    for weight, generator in zip(weights, generators, strict=True):
        if std is None:
            nn.init.xavier_uniform_(weight, generator=generator)
        else:
            nn.init.normal_(weight, std=std, generator=generator)
    return nn.Parameter(torch.stack(weights))


InitStds = tuple[float, float] | None
"""Deviations of normal first weights: of those that rows go into, and of those that give the result."""


class ExpertSettings(Settings, ABC):
    """An expert type as a section of the configuration: a literal ``name`` and the type's own fields."""

    name: str

    @abstractmethod
    def build(self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: InitStds = None) -> ExpertBank:
        """Return the experts ``expert_ids`` out of ``num_experts``, which take rows of width ``dim``.

        ``init_stds``: asked for by the model; a type that begins by rules of its own may ignore them.
        """

    def validation_errors(self, dim: int, out_dim: int | None = None) -> Iterator[str]:
        """Yield why the experts cannot take rows of width ``dim``, or not give ``out_dim``, as "field=value: reason".

        ``out_dim``: None where the model takes results of any width.
        """
        return iter(())
