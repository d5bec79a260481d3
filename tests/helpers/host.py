"""What must not happen on an accelerator, told without one: the host looks at values, or sums are made by atomics."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "argwhere",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations of torch after which the host waits for the device to know a number or a size."""


class HostLooked(AssertionError):
    """An operation was called that would make the host wait for a device."""


class NoLook(TorchDispatchMode):
    """Within: every operation that would make the host wait for a device raises :class:`HostLooked`.

    ``once``: the name of one that may be called once.
    """

    def __init__(self, once: str | None = None) -> None:
        super().__init__()
        self._allowed = once

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITING or by_mask or repeats:
            if name != self._allowed:
                raise HostLooked(str(func))
            self._allowed = None
        return func(*args, **(kwargs or {}))


ATOMIC = {"index_add": 2, "index_add_": 2, "scatter_add": 2, "scatter_add_": 2}
"""Operations that a GPU does by atomic additions, and at which place the index is among their arguments. (An
``index_put`` that accumulates sorts its rows first.)"""


class NoAtomicSums(TorchDispatchMode):
    """Within: an operation raises AssertionError if on a GPU its bits could differ from run to run, because several
    floating-point numbers are added at one place in whatever order they come."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = ATOMIC.get(func._schema.name.split("::")[1])
        if place is not None and args[0].is_floating_point():
            index = args[place]
            along = index.flatten() if index.dim() == 1 else index.movedim(args[1], 0)
            repeated = (along.sort(dim=0).values.diff(dim=0) == 0).any()
            assert not repeated, f"{func} adds floating-point numbers at repeated places"
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Within: ``peak`` bytes of all storages that operations made and that lived at the same time.

    Works on fake tensors of any size. What an operation uses inside and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
