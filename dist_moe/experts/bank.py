"""Banks of experts, stacked weights of some of the experts by global id, and the settings that build them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import Settings
from dist_moe.errors import UserError
from dist_moe.experts.batch_norm import ExpertBatchNorm
from dist_moe.experts.low_rank import LowRankMatrix, batched_linear


class ExpertBank(nn.Module, ABC):
    """The experts ``expert_ids`` out of ``num_experts``; axis 0 of every parameter is the expert.

    ``expert_ids``: distinct global ids of the experts that this bank holds, in the order of axis 0.
    ``dim``, ``out_dim``: width of the rows it takes and of those it gives.
    ``group_name``: None, or the name under which its ``num_marked`` parameters are marked, see :meth:`mark`.
    ``dealt_PE``: None, or the :meth:`fingerprint` of what it was last given: built, loaded, cast or moved.
    ``batch_dependent``: whether a row's result depends on the expert's other rows of the pass, of all ranks: such a
    bank is called once in a pass.
    ``hidden_axes``: the parameters that have the units of a hidden layer along an axis, by name, with that axis: who
    reorders an expert's units in all of them leaves what it computes. Empty: there is nothing to reorder.
    ``matrices``: the parameters (E_local, in, out) that :meth:`factor` can store in another way, by name; a bank that
    has some multiplies with them by :meth:`grouped` and :meth:`batched`. ``factored``: those that are.
    """

    group_name: str | None = None
    num_marked: int = 0
    dealt_PE: Tensor | None = None
    batch_dependent: bool = False
    hidden_axes: Mapping[str, int] = MappingProxyType({})
    matrices: tuple[str, ...] = ()
    factored: tuple[str, ...] = ()

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
        self.register_load_state_dict_post_hook(_mark_again)

    def add_over_ranks(self, added: Callable[[Tensor], Tensor]) -> None:
        """Take statistics over the rows of all ranks: ``added`` adds a tensor up over them, differentiably.

        For whoever builds a layer of several ranks; a bank that needs none has nothing to do.
        """
        for module in self.modules():
            if isinstance(module, ExpertBatchNorm):
                module.added = added

    def factor(self, rank: int, rows: Mapping[str, int] | None = None) -> None:
        """Store each of ``matrices`` as U V + S: see :class:`~dist_moe.experts.low_rank.LowRankMatrix`.

        In the place of ``up`` there are parameters ``up_into``, ``up_back`` and ``up_sparse``, and a buffer
        ``up_row_ids`` (E, Q) of *all* experts by global id, the same on every rank. ``rows``: of S, by the matrix's
        name; None: all. First factors are glorot-uniform, S is 0. Raises UserError for a bank without matrices, for a
        rank above a matrix's own, and for rows that do not fit.
        """
        weights = {name: weight for name in self.matrices if (weight := getattr(self, name)) is not None}
        if not weights:
            raise UserError("model.low_rank: these experts have no matrices that can be factored; set it to null")
        rows = {name: weight.shape[2] for name, weight in weights.items()} if rows is None else rows
        if rows.keys() != weights.keys():
            raise UserError(f"model.low_rank.rows: names {sorted(rows)}; the experts' matrices are {sorted(weights)}")
        generators = self.generators()
        for name, weight in weights.items():
            (local, dim, out_dim), count = weight.shape, rows[name]
            if rank > min(dim, out_dim):
                raise UserError(f"model.low_rank.rank={rank}: {name} is {dim} x {out_dim}; use {min(dim, out_dim)}")
            if count > out_dim:
                raise UserError(f"model.low_rank.rows: {name}={count} exceeds its {out_dim} rows")
            delattr(self, name)
            self.register_parameter(f"{name}_into", drawn((dim, rank), generators))
            self.register_parameter(f"{name}_back", drawn((rank, out_dim), generators))
            if count:
                self.register_parameter(f"{name}_sparse", nn.Parameter(torch.zeros(local, dim, count)))
                ids_EQ = torch.arange(count, dtype=torch.int32).repeat(self.num_experts, 1)
                self.register_buffer(f"{name}_row_ids", ids_EQ)
        self.factored = tuple(weights)

    def low_rank(self, name: str) -> LowRankMatrix:
        """Return the matrix ``name``, one of ``factored``, of the local experts."""
        parts: dict[str, Any] = {part: getattr(self, f"{name}_{part}", None) for part in LowRankMatrix._fields}
        ids_EQ = parts["row_ids"]
        if ids_EQ is not None and self.expert_ids != tuple(range(self.num_experts)):
            parts["row_ids"] = ids_EQ[torch.tensor(self.expert_ids, device=ids_EQ.device)]
        return LowRankMatrix(**parts)

    def grouped(self, x_ND: Tensor, name: str, bias_EF: Tensor | None, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return (N, out): rows sorted by local expert times its matrix ``name``, plus its bias if there is one."""
        if name in self.factored:
            return self.low_rank(name).grouped(x_ND, bias_EF, rows_per_expert)
        return kernels.grouped_linear(x_ND, getattr(self, name), bias_EF, rows_per_expert)

    def batched(self, x_ETD: Tensor, name: str, bias_EF: Tensor | None) -> Tensor:
        """Return (E_local, T, out): every local expert's rows times its matrix ``name``, plus its bias."""
        if name in self.factored:
            return self.low_rank(name).batched(x_ETD, bias_EF)
        return batched_linear(x_ETD, getattr(self, name), bias_EF)

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

    def mark(self, group_name: str) -> None:
        """Say on every parameter that it is of experts which only some ranks have, in words of DeepSpeed and DDP.

        ``group_name``: its name for the groups of ranks that hold copies. The marks outlast ``deepcopy``, ``pickle``,
        loading, and what ``Module.to`` and its like do to parameters. What the experts are now counts as dealt.
        """
        self.group_name = group_name
        self.num_marked = len(list(self.parameters()))
        marks = {
            "allreduce": False,
            "group_name": group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": group_name,
            "_ddp_ignored": True,
        }
        for parameter in self.parameters():
            for name, value in marks.items():
                setattr(parameter, name, value)
        self.dealt_PE = self.fingerprint()

    @torch.no_grad()
    def fingerprint(self) -> Tensor | None:
        """Return (P, E_local) int64, a checksum of every expert in every parameter; None where they hold no numbers.

        Of the bits of at most 64 numbers each, evenly spread; a device is not waited for. Parameters without numbers
        are those on the meta device, and slices of ZeRO stage 3 and FSDP.
        """
        parameters = [p for p in self.parameters() if p.shape[:1] == (self.num_local_experts,)]
        if not parameters or any(p.is_meta or not p.numel() or type(p) is not nn.Parameter for p in parameters):
            return None
        return torch.stack([_checksums(parameter.flatten(1)) for parameter in parameters])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        _mark_again(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mark the parameters of a copy, which torch makes without their attributes."""
        super().__setstate__(state)
        _mark_again(self)

    def generators(self) -> list[torch.Generator]:
        """Return one generator per local expert, for an initialisation that does not depend on the layout.

        Takes a single draw from torch's global generator, whatever the number of local experts.
        """
        base = int(torch.randint(2**62, (), device="cpu").item())
        if torch.get_default_device().type == "meta":
            return [torch.Generator()] * self.num_local_experts  # nothing is drawn from them
        return [torch.Generator().manual_seed((base + 0x9E3779B97F4A7C15 * e) % 2**63) for e in self.expert_ids]


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksums(x_EN: Tensor) -> Tensor:
    """Return (E,) int64: weighted sums of bits. Weights are odd, so that no bit vanishes modulo 2^64."""
    rows_EN = x_EN if x_EN.dim() > 1 else x_EN.unsqueeze(1)
    picked_EN = rows_EN[:, :: max(1, rows_EN.shape[1] // 64)][:, :64].contiguous()
    bits_EN = picked_EN.view(_INTEGER_OF_SIZE[picked_EN.element_size()]).long()
    return (bits_EN * (2 * torch.arange(bits_EN.shape[1], device=bits_EN.device) + 1)).sum(dim=1)


def _mark_again(bank: nn.Module, *_: Any) -> None:
    """Mark the parameters of ``bank`` as before, when they may have been replaced."""
    if isinstance(bank, ExpertBank) and bank.group_name is not None:
        bank.mark(bank.group_name)


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

    @property
    def batch_dependent(self) -> bool:
        """Whether a row's result depends on the expert's other rows, as with batch normalisation."""
        return False

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
