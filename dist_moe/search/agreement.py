"""How all ranks come to the same table: rank 0 decides, everybody proves it by digest."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dist_moe.parallel import current_world, several_ranks

_NOT_FINITE = "the relaxed permutation holds a NaN or an infinity"


def agree_on_tables(soft: Tensor) -> Tensor:
    """Return rank 0's ``soft`` (..., n, n), rounded to the nearest permutations (..., n) int64, on every rank.

    With one rank, no collective is issued. Raises, on every rank:
    FloatingPointError if rank 0's ``soft`` holds a NaN or an infinity; RuntimeError if some rank ended up
    with another table.
    """
    if not several_ranks():
        return round_to_tables(soft)
    decides = current_world().rank == 0 and bool(torch.isfinite(soft).all())
    undecided = torch.full(soft.shape[:-1], -1, device=soft.device)
    tables = take_from_first_rank(round_to_tables(soft) if decides else undecided)
    if bool((tables < 0).any()):
        raise FloatingPointError(_NOT_FINITE)
    return tables


def take_from_first_rank(tables: Tensor) -> Tensor:
    """Return rank 0's ``tables`` on every rank, proven by digest. Nothing is sent where there is one rank."""
    if not several_ranks():
        return tables
    tables = current_world().broadcast(tables)
    assert_same_on_all_ranks(tables)
    return tables


def round_to_tables(soft: Tensor) -> Tensor:
    """Return (..., n): the permutation nearest to each of (..., n, n) matrices."""
    tables = [round_to_table(matrix) for matrix in soft.reshape(-1, *soft.shape[-2:])]
    return torch.stack(tables).view(soft.shape[:-1])


def round_to_table(soft: Tensor) -> Tensor:
    """Return the assignment slot -> expert that maximises the sum of the chosen entries of ``soft``.

    Raises FloatingPointError if ``soft`` holds a NaN or an infinity.
    """
    from scipy.optimize import linear_sum_assignment

    if not torch.isfinite(soft).all():
        raise FloatingPointError(_NOT_FINITE)
    _, expert_S = linear_sum_assignment(soft.detach().double().cpu().numpy(), maximize=True)
    return torch.from_numpy(expert_S).to(soft.device, torch.int64)


def assert_same_on_all_ranks(table: Tensor) -> None:
    """Compare a digest of ``table`` over all ranks; RuntimeError names the ranks that differ."""
    if not several_ranks():
        return
    digest = int.from_bytes(hashlib.sha256(table.cpu().numpy().tobytes()).digest()[:8], "big", signed=True)
    all_digests = current_world().gather(torch.tensor([digest], device=table.device))
    differing = [rank for rank, digest in enumerate(all_digests) if not torch.equal(digest, all_digests[0])]
    if differing:
        raise RuntimeError(f"the slot map of ranks {differing} differs from that of rank 0")
