"""Reading checkpoints: what their tensors are, one tensor at a time, for any layout."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_moe.engine.checkpoint.format import BUFFER, DENSE, EXPERTS, Key
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec, spec_in_file
from dist_moe.engine.deepspeed.parameter_state import MASTER
from dist_moe.engine.deepspeed.sharded_parameters import whole_shape
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A dense parameter, a parameter of all experts, or a buffer of a checkpoint.

    ``states``: MASTER and the optimizer's, or BUFFER alone. ``experts``: how many, None for what is no expert's.
    ``spec``: of one expert's part of the first state, or of the whole. ``num_bytes``: of all states and experts.
    """

    name: str
    states: tuple[str, ...]
    experts: int | None
    spec: TensorSpec
    num_bytes: int

    @property
    def kind(self) -> str:
        """DENSE, EXPERTS or BUFFER."""
        return BUFFER if self.states == (BUFFER,) else DENSE if self.experts is None else EXPERTS

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of one state, with the experts as axis 0."""
        return self.spec.shape if self.experts is None else (self.experts, *self.spec.shape)

    def keys(self, state: str) -> list[Key]:
        """Return the names of the tensors of one state, in the order of the experts."""
        return [Key(self.name, state, e) for e in ([None] if self.experts is None else range(self.experts))]


class CheckpointReader:
    """The tensors of a verified checkpoint, in whichever file they are. ``entries``: by name.

    Raises UserError where experts are missing: their ids must be 0 .. E - 1, in every state.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = {path.name: safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))}
        self._file_of = {Key.parse(k): name for name, file in self._files.items() for k in file.keys()}  # noqa: SIM118
        self.entries = {entry.name: entry for entry in self._find_entries()}

    def spec(self, key: Key) -> TensorSpec:
        """Return dtype and shape of one tensor, without reading it."""
        return spec_in_file(self._files[self._file_of[key]], str(key))

    def read(self, key: Key) -> Tensor:
        """Return one tensor. Raises UserError if there is none of that name."""
        if key not in self._file_of:
            raise self._misfit(f"it has no {key}")
        tensor: Tensor = self._files[self._file_of[key]].get_tensor(str(key))
        return tensor

    def check_states(self, trained: Container[str], *, moments: bool) -> None:
        """Raise UserError unless all ``trained`` parameters have the same states: with ``moments``, more than masters.

        Of the others, which are held still, the masters suffice.
        """
        states = {name: entry.states for name, entry in self.entries.items() if name in trained}
        expected = max(states.values(), key=len, default=())
        for name, found in states.items():
            if found != expected or (moments and len(found) < 2):
                raise self._misfit(f"{name} has no optimizer state but {list(found)}")

    def check_names(self, model: nn.Module) -> None:
        """Raise UserError naming every parameter and buffer that only one of checkpoint and ``model`` has."""
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        misfits = [f"it has no {name}" for name in sorted(names - self.entries.keys())]
        misfits += [f"the model has no {name}" for name in sorted(self.entries.keys() - names)]
        if misfits:
            raise self._misfit("; ".join(misfits))

    def parameter(
        self, name: str, like: nn.Parameter, expert_ids: Sequence[int] | None, *, moments: bool = True
    ) -> dict[str, Tensor]:
        """Return master and (where ``moments``) optimizer states of a parameter, on its device, in its whole shape.

        Raises UserError if one is missing or has another shape.
        """
        shape = whole_shape(like)

        def whole(state: str) -> Tensor:
            if expert_ids is None:
                return self._read_as(Key(name, state), shape).to(like.device)
            experts = [self._read_as(Key(name, state, expert), shape[1:]) for expert in expert_ids]
            return torch.stack(experts).to(like.device)

        return {state: whole(state) for state in (self.entries[name].states if moments else (MASTER,))}

    def fill_buffers(self, model: nn.Module) -> None:
        """Copy all buffers into ``model``. Raises UserError if one is missing or has another shape."""
        for name, buffer in model.named_buffers():
            buffer.copy_(self._read_as(Key(name, BUFFER), buffer.shape))

    def _read_as(self, key: Key, shape: torch.Size) -> Tensor:
        tensor = self.read(key)
        if tensor.shape != shape:
            raise self._misfit(f"{key} has shape {tuple(tensor.shape)} there and {tuple(shape)} here")
        return tensor

    def _misfit(self, reason: str) -> UserError:
        return UserError(
            f"checkpoint {self._directory} is not one of this model: {reason}; "
            "use the configuration with which it was written"
        )

    def _find_entries(self) -> Iterator[Entry]:
        found: dict[str, dict[str, list[Key]]] = {}
        for key in sorted(self._file_of, key=lambda key: (key.name, key.state != MASTER, key.state, key.expert or 0)):
            found.setdefault(key.name, {}).setdefault(key.state, []).append(key)
        for name, keys_of in found.items():
            first, *_ = keys_of.values()
            experts = None if first[0].expert is None else len(first)
            num_bytes = sum(self.spec(key).num_bytes for keys in keys_of.values() for key in keys)
            entry = Entry(name, tuple(keys_of), experts, self.spec(first[0]), num_bytes)
            for state, keys in keys_of.items():
                if keys != entry.keys(state):
                    raise UserError(
                        f"checkpoint {self._directory} is not whole: {name}|{state} is there for experts "
                        f"{[key.expert for key in keys]} only"
                    )
            yield entry
