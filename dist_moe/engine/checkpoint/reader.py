"""Reading checkpoints: what their tensors are, one tensor at a time, for any layout."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_moe.engine.checkpoint.format import BUFFER, DENSE, EXPERTS, Key, expert_ids_by_parameter
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
    """The tensors of a checkpoint whose digests hold, in whichever file they are. ``entries``: by name.

    Raises UserError naming the file that is none of tensors, the tensor that is in two files, has a dtype or a shape
    that it cannot have, or where experts are missing: their ids must be 0 .. E - 1, in every state.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._file_of: dict[Key, str] = {}
        self._specs: dict[Key, TensorSpec] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self._open(path)
        self.entries = {entry.name: entry for entry in self._find_entries()}

    def _open(self, path: Path) -> None:
        try:
            self._files[path.name] = file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                key = Key.parse(name)
                if key in self._file_of:
                    raise ValueError(f"{key} is in {self._file_of[key]} already")
                self._file_of[key], self._specs[key] = path.name, spec_in_file(file, name)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"checkpoint file {path} is no file of tensors of a checkpoint: {error}") from error

    def spec(self, key: Key) -> TensorSpec:
        """Return dtype and shape of one tensor, without reading it."""
        return self._specs[key]

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

    def check_model(self, model: nn.Module) -> None:
        """Raise UserError naming every parameter and buffer that is not as in ``model``, by kind, shape or dtype."""
        parameters = {name: (p, ids) for name, p, ids in expert_ids_by_parameter(model)}
        buffers = dict(model.named_buffers())
        names = parameters.keys() | buffers.keys()
        misfits = [f"it has no {name}" for name in sorted(names - self.entries.keys())]
        misfits += [f"the model has no {name}" for name in sorted(self.entries.keys() - names)]
        for name, (parameter, ids) in parameters.items():
            if name in self.entries:
                misfits += self._misfits_of(name, whole_shape(parameter), ids, None)
        for name, buffer in buffers.items():
            if name in self.entries:
                misfits += self._misfits_of(name, buffer.shape, None, buffer.dtype)
        if misfits:
            raise self._misfit("; ".join(misfits))

    def _misfits_of(
        self, name: str, shape: torch.Size, expert_ids: Sequence[int] | None, dtype: torch.dtype | None
    ) -> Iterator[str]:
        """Yield how a parameter (``dtype`` None: the masters are fp32 anyway) or a buffer differs from the model's."""
        entry, expected = self.entries[name], tuple(shape if expert_ids is None else shape[1:])
        kind = BUFFER if dtype else DENSE if expert_ids is None else EXPERTS
        if entry.kind != kind:
            yield f"{name} is of the kind {entry.kind} there and {kind} here"
        elif expert_ids and max(expert_ids) >= (entry.experts or 0):
            yield f"{name} has {entry.experts} experts there, and expert {max(expert_ids)} here"
        elif entry.spec.shape != expected:
            yield f"{entry.keys(entry.states[0])[0]} has shape {entry.spec.shape} there and {expected} here"
        elif (
            dtype and entry.spec.dtype != dtype and not (dtype.is_floating_point and entry.spec.dtype.is_floating_point)
        ):
            yield f"{name} is {entry.spec.dtype} there and {dtype} here"

    def parameter(self, name: str, expert_ids: Sequence[int] | None, *, moments: bool = True) -> dict[str, Tensor]:
        """Return master and (where ``moments``) optimizer states of a parameter in host memory, with those experts."""
        states = self.entries[name].states if moments else (MASTER,)
        if expert_ids is None:
            return {state: self.read(Key(name, state)) for state in states}
        return {state: torch.stack([self.read(Key(name, state, e)) for e in expert_ids]) for state in states}

    def fill_buffers(self, model: nn.Module) -> None:
        """Copy all buffers into ``model``, which :meth:`check_model` has seen."""
        for name, buffer in model.named_buffers():
            buffer.copy_(self.read(Key(name, BUFFER)))

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
            if BUFFER in keys_of and (len(keys_of) > 1 or experts):
                raise self._malformed(f"{name} has the states {list(keys_of)}; a buffer has no other, and no experts")
            if BUFFER not in keys_of and entry.states[0] != MASTER:
                raise self._malformed(f"{name} has no {MASTER} but {list(keys_of)}")
            for state, keys in keys_of.items():
                if keys != entry.keys(state):
                    ids = [key.expert for key in keys]
                    raise self._malformed(f"it is not whole: {name}|{state} is there for experts {ids} only")
                for key in keys if state != BUFFER else ():
                    if self.spec(key) != TensorSpec(torch.float32, entry.spec.shape):
                        raise self._malformed(
                            f"{key} is {self.spec(key)}; it must be torch.float32 of shape {entry.spec.shape}"
                        )
            yield entry

    def _malformed(self, reason: str) -> UserError:
        return UserError(f"checkpoint {self._directory} is malformed: {reason}; use another one")
