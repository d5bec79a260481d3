"""What the tensors of a checkpoint are (parameters, experts, states, buffers), and reading them one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dist_moe.engine.checkpoint.reader import BUFFER
from dist_moe.engine.checkpoint.tensor_file import DTYPE_NAMES, TensorSpec
from dist_moe.engine.deepspeed.parameter_state import MASTER
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A dense parameter, a parameter of all experts, or a buffer.

    ``states``: "master" and the optimizer's, or "buffer" alone. ``experts``: how many, None for what is
    no expert's. ``shape``: of one expert's part, or of the whole. ``num_bytes``: of all states and experts.
    """

    name: str
    states: tuple[str, ...]
    experts: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int

    @property
    def is_buffer(self) -> bool:
        return self.states == (BUFFER,)

    @property
    def numel(self) -> int:
        """Of one state, over all experts."""
        return torch.Size(self.shape).numel() * (1 if self.experts is None else self.experts)

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """With the experts as axis 0."""
        return self.shape if self.experts is None else (self.experts, *self.shape)

    def keys(self, state: str) -> Iterator[str]:
        """Names of the tensors of one state, in the order of the experts."""
        if self.experts is None:
            yield f"{self.name}|{state}"
        else:
            yield from (f"{self.name}|{state}|{expert}" for expert in range(self.experts))


class Catalog:
    """The tensors of a verified checkpoint. ``entries``: by name.

    Raises UserError where experts are missing: their ids must be 0 .. E - 1, in every state.
    """

    def __init__(self, directory: Path) -> None:
        self._files = {path.name: safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))}
        self._file_of = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118
        self._directory = directory
        self.entries = {entry.name: entry for entry in self._find_entries()}

    def spec(self, key: str) -> TensorSpec:
        """Of one tensor, without reading it."""
        part = self._files[self._file_of[key]].get_slice(key)
        return TensorSpec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def read(self, key: str) -> Tensor:
        return self._files[self._file_of[key]].get_tensor(key)

    def pieces(self, entry: Entry, state: str) -> Iterable[Tensor]:
        """One expert after the other, or the whole."""
        return (self.read(key) for key in entry.keys(state))

    def expert_files(self) -> list[str]:
        """Names of the files that hold experts."""
        return sorted({name for key, name in self._file_of.items() if key.count("|") == 2})

    def _find_entries(self) -> Iterator[Entry]:
        found: dict[str, dict[str, list[int]]] = {}
        for key in self._file_of:
            name, state, *expert = key.split("|")
            found.setdefault(name, {}).setdefault(state, []).extend(map(int, expert))
        for name, experts_of in sorted(found.items()):
            yield self._entry(name, {state: sorted(ids) for state, ids in experts_of.items()})

    def _entry(self, name: str, experts_of: dict[str, list[int]]) -> Entry:
        states = tuple(sorted(experts_of, key=lambda state: (state != MASTER, state)))
        ids = experts_of[states[0]]
        for state, others in experts_of.items():
            if others != list(range(len(ids))):
                raise UserError(
                    f"checkpoint {self._directory} is not whole: {name}|{state} is there for experts {others} only"
                )
        keys = [f"{name}|{state}{suffix}" for state in states for suffix in ([f"|{i}" for i in ids] or [""])]
        first = self.spec(keys[0])
        num_bytes = sum(self.spec(key).num_bytes for key in keys)
        return Entry(name, states, len(ids) or None, first.shape, first.dtype, num_bytes)


_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
