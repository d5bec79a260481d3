"""Emulated worlds: many ranks in one process, on one device, with the code and the bits of real ranks.

    emulated = EmulatedWorld(4)

    def step(world):
        moe = build_layer(world)                            # its share: experts_of_rank(num_experts, world)
        moe(tokens[world.rank]).outputs[0].sum().backward()
        return moe.experts.weight.grad

    gradients = emulated.run(step)

Every rank has an autograd graph of its own, node for node that of a real rank, and its backward pass meets
those of the others in the exchange, as its forward pass did. (One graph through all ranks would serve a
backward pass of the summed losses only, not ``loss.backward(); optimizer.step()`` on each rank, and would
add up gradients in another order.) So what runs on real ranks runs here: whole training loops and searches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_moe.parallel.lockstep import Lockstep, ShareOut
from dist_moe.parallel.world import ExchangeOptions, Levels, SingleWorld, World, current_world, use_world

Result = TypeVar("Result")
DEADLINE_S = 300.0

_lockstep_here: ContextVar[Lockstep[Any] | None] = ContextVar("lockstep_here", default=None)
"""The run to which this thread belongs. A rank that was given up and comes back finds its own, not a later one."""


class EmulatedWorld:
    """``EmulatedWorld(size)``: ``ranks`` are its worlds, in rank order; layers may keep them between runs.

    ``ranks_per_node``: they live in nodes of that many consecutive ranks, and layers exchange tokens in two
    levels; None: all in one node. ``options``: how they exchange.

    Ranks take turns (see ``lockstep.py``), hence everything is deterministic. They live in one process:
    what they share, say a gate, has one ``grad``, into which all of them add; give each a copy (or build
    the model inside ``run``) to see gradients per rank. Whatever they share must be leaves: a graph that
    was built before :meth:`run` can be walked by the backward pass of one rank only.

    ``deadline_s``: seconds that a rank may take between two collectives; None in a debugger.
    Raises ValueError unless ``size`` >= 1, and ``ranks_per_node`` divides it.
    """

    def __init__(
        self,
        size: int,
        deadline_s: float | None = DEADLINE_S,
        *,
        ranks_per_node: int | None = None,
        options: ExchangeOptions | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: an emulated world has at least one rank")
        if ranks_per_node is not None and (ranks_per_node < 1 or size % ranks_per_node):
            raise ValueError(f"ranks_per_node={ranks_per_node} does not divide the {size} ranks: nodes are alike")
        self.size = size
        self.deadline_s = deadline_s
        self.ranks = tuple(EmulatedRank(rank, size, ranks_per_node, options) for rank in range(size))

    def run(self, function: Callable[[EmulatedRank], Result]) -> list[Result]:
        """Call ``function(world)`` once per rank and return the results in rank order.

        Within, :func:`~dist_moe.parallel.current_world` is the emulated world: gates, searches and all else that
        asks for all ranks of the job gets these. All ranks start with the caller's random numbers, like
        processes that are seeded alike, and each goes on with its own; the caller with those of rank 0.

        Raises what the first rank to fail raised, after all have ended; RuntimeError if the ranks do not
        issue the same collectives in the same order; TimeoutError if a rank keeps the others waiting for
        more than ``deadline_s``. Each says which ranks, and where.
        """
        lockstep: Lockstep[Result] = Lockstep(self.size, self.deadline_s)

        def on_rank(rank: int) -> Result:
            _lockstep_here.set(lockstep)
            with use_world(self.ranks[rank]):
                return function(self.ranks[rank])

        return lockstep.run(on_rank)

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Do the backward passes of the losses that an earlier :meth:`run` returned, one per rank, in rank order.

        Afterwards the parameters of every rank hold the gradient of the sum of the losses.
        """
        if len(losses) != self.size:
            raise ValueError(f"{len(losses)} losses for {self.size} ranks: each rank must give one")
        self.run(lambda world: losses[world.rank].backward())


class _Emulated(World):
    """A world whose ranks meet in this process. A copy of a layer is on the layer's rank: a rank's copy is the rank."""

    @abstractmethod
    def _meet(self, what: str, brought: Any, share_out: ShareOut) -> Any:
        """Bring something to all ranks of this world, and take away what ``share_out`` gives this one.

        ``share_out`` makes copies: what ranks bring and take away is theirs, as if it had travelled.
        """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Emulated:
        return self

    def exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Exchange rows, which are copied from rank to rank."""
        row = f"exchange of {x_ND.dtype} rows of shape {tuple(x_ND.shape[1:])}"
        return self._meet(row, (x_ND.detach(), send_rows, receive_rows), _share_out_rows)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum. Added in rank order: a real backend may add, hence round, in another one."""

        def share_out(of_ranks: list[Tensor]) -> list[Tensor]:
            total = of_ranks[0].clone()
            for of_rank in of_ranks[1:]:
                total += of_rank
            return [total.clone() for _ in of_ranks]

        return self._meet(f"sum of {_kind(x)}", x.detach(), share_out)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return a copy of rank 0's ``x``."""
        own = x.detach().contiguous()
        return self._meet(f"broadcast of {_kind(x)}", own, lambda of_ranks: [of_ranks[0].clone() for _ in of_ranks])

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return copies of all ranks' ``x``."""
        return self._meet(
            f"gather of {_kind(x)}", x.detach(), lambda of_ranks: [[x.clone() for x in of_ranks] for _ in of_ranks]
        )

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self._meet("barrier", None, lambda of_ranks: of_ranks)


class EmulatedRank(_Emulated):
    """A rank of an :class:`EmulatedWorld`; with ``per_node``, in nodes of that many consecutive ranks."""

    def __init__(self, rank: int, size: int, per_node: int | None, options: ExchangeOptions | None) -> None:
        node_of_rank = None if per_node is None else [other // per_node for other in range(size)]
        super().__init__(rank, size, node_of_rank, options=options)
        if per_node is not None:
            nodes = [range(first, first + per_node) for first in range(0, size, per_node)]
            peers = [range(place, size, per_node) for place in range(per_node)]
            alone = SingleWorld(self.traffic)  # ranks that are alone in their groups exchange nothing there
            self.levels = Levels(
                _Part(self, "across nodes", peers, range(len(nodes))) if len(nodes) > 1 else alone,
                _Part(self, "within a node", nodes, None) if per_node > 1 else alone,
            )

    @torch.no_grad()
    def _meet(self, what: str, brought: Any, share_out: ShareOut) -> Any:
        lockstep = _lockstep_here.get()
        if lockstep is None or current_world() is not self:
            raise RuntimeError(
                f"{what} on emulated rank {self.rank} outside its own function: call layers within "
                "EmulatedWorld.run, each on its own rank, and losses' backward() there or by EmulatedWorld.backward"
            )
        return lockstep.meet(self.rank, what, brought, share_out)


class _Part(_Emulated):
    """The ranks of one of ``groups`` into which all ranks are divided. All groups meet at the same time."""

    def __init__(
        self, whole: EmulatedRank, name: str, groups: Sequence[Sequence[int]], node_of_rank: Sequence[int] | None
    ) -> None:
        (mine,) = (group for group in groups if whole.rank in group)
        super().__init__(mine.index(whole.rank), len(mine), node_of_rank, whole.traffic, options=whole.options)
        self._whole = whole
        self._name = name
        self._groups = groups

    def _meet(self, what: str, brought: Any, share_out: ShareOut) -> Any:
        def share_out_in_groups(of_ranks: list[Any]) -> list[Any]:
            shares: dict[int, Any] = {}
            for group in self._groups:
                try:
                    of_group = share_out([of_ranks[rank] for rank in group])
                except RuntimeError as error:
                    error.add_note(f"{self._name}, among the ranks {list(group)}")
                    raise
                shares |= zip(group, of_group, strict=True)
            return [shares[rank] for rank in range(len(of_ranks))]

        return self._whole._meet(f"{what} {self._name}", brought, share_out_in_groups)


def _share_out_rows(of_ranks: list[tuple[Tensor, list[int], list[int]]]) -> list[Tensor]:
    """Every rank's rows, cut by receiver, put together again by source."""
    parts = [x_ND.split(send_rows) for x_ND, send_rows, _ in of_ranks]
    for rank, (_, _, expected) in enumerate(of_ranks):
        if (arriving := [len(of_source[rank]) for of_source in parts]) != expected:
            raise RuntimeError(f"rank {rank} expects {expected} rows of the ranks, but they send {arriving}")
    return [torch.cat([of_source[rank] for of_source in parts]) for rank in range(len(of_ranks))]


def _kind(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
