"""Moves of a table search: swaps of two slots' experts, one or several in a row, and what controls do instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Control = Literal["random_swaps", "identity"]
"""A control's substitute for the moves that a search found: as many random swaps in the same rows, or nothing."""


@dataclass(frozen=True, order=True)
class Swap:
    """Exchange the experts of ``slots`` in row ``row`` (gate, branch) of the table of layer ``layer``."""

    layer: int
    row: tuple[int, int]
    slots: tuple[int, int]


Move = tuple[Swap, ...]
"""Swaps, one after the other. Done again in the reverse order they undo themselves."""


def apply(move: Iterable[Swap], tables: Sequence[Tensor]) -> None:
    """Exchange the experts in ``tables``, (P, K, S) of each layer, in place."""
    for swap in move:
        expert_S = tables[swap.layer][swap.row]
        expert_S[list(swap.slots)] = expert_S[list(swap.slots[::-1])]


def rows_of(table: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the (gate, branch) rows of a (P, K, S) table."""
    return itertools.product(range(table.shape[0]), range(table.shape[1]))


def swaps_towards(layer: int, row: tuple[int, int], source_S: Sequence[int]) -> Move:
    """Return the swaps, at most S - 1, after which slot s has the expert that slot ``source_S[s]`` had before."""
    now, move = list(range(len(source_S))), []
    for slot, source in enumerate(source_S):
        if now[slot] != source:
            other = now.index(source, slot + 1)
            now[slot], now[other] = now[other], now[slot]
            move.append(Swap(layer, row, (slot, other)))
    return tuple(move)


def take_control(control: Control, move: Move, tables: Sequence[Tensor], seed: int) -> Move:
    """Undo ``move`` in ``tables`` and do what ``control`` says instead; return the swaps that were done.

    ``seed``: of the random swaps, alike on all ranks: each exchanges two slots that have different experts.
    """
    apply(reversed(move), tables)
    if control == "identity":
        return ()
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for swap in move:
        source_S = tables[swap.layer][swap.row]
        pair_2N = torch.triu_indices(len(source_S), len(source_S), offset=1)
        pair_2N = pair_2N[:, (source_S[pair_2N[0]] != source_S[pair_2N[1]]).cpu()]
        first, second = pair_2N[:, torch.randint(pair_2N.shape[1], (), generator=generator)].tolist()
        drawn.append(Swap(swap.layer, swap.row, (first, second)))
        apply(drawn[-1:], tables)
    return tuple(drawn)
