"""Some of a rank's experts at a time, without a full stack of gradients for each time."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.func import functional_call

from dist_moe.kernels import RowCounts, counts_on_host
from dist_moe.parallel.exchange import LocalExperts
from dist_moe.parallel.phase_clock import MarkedExperts


def parts_of(experts: LocalExperts, sizes: list[int]) -> list[LocalExperts]:
    """The first ``sizes[0]`` local experts, the next ``sizes[1]``, ...; each takes rows and counts of its own only.

    The parameters of a bank, whose axis 0 is the expert, are split once: the gradients of the parts are then put
    side by side. Where they are not to be had (another callable, or parameters that are sharded until the bank is
    called) each part is the whole bank with no rows for the rest, whose gradients are added up.
    """
    if isinstance(experts, MarkedExperts):
        return [MarkedExperts(experts.mark, part) for part in parts_of(experts.inner, sizes)]
    if isinstance(experts, nn.Module) and all(len(p) == sum(sizes) for p in experts.parameters()):
        pieces = {name: p.split(sizes) for name, p in experts.named_parameters()}
        return [
            partial(_with_weights, experts, {name: split[i] for name, split in pieces.items()})
            for i in range(len(sizes))
        ]
    return [partial(_alone, experts, sum(sizes[:i]), sum(sizes[i + 1 :])) for i in range(len(sizes))]


def _with_weights(bank: nn.Module, weights: dict[str, Tensor], x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
    result: Tensor = functional_call(bank, weights, (x_ND, rows_per_expert))
    return result


def _alone(experts: LocalExperts, before: int, after: int, x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
    return experts(x_ND, [0] * before + counts_on_host(rows_per_expert) + [0] * after)
