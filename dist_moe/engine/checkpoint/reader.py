"""Reading a checkpoint for a layout that may differ from the one that wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_moe.engine.deepspeed.sharded_parameters import whole_shape
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank

BUFFER = "buffer"


def expert_ids_by_parameter(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, Sequence[int] | None]]:
    """(name, parameter, global ids of the experts along axis 0, or None for a dense parameter)."""
    ids = {
        f"{bank_name}.{name}" if bank_name else name: bank.expert_ids
        for bank_name, bank in model.named_modules()
        if isinstance(bank, ExpertBank)
        for name, _ in bank.named_parameters()
    }
    for name, parameter in model.named_parameters():
        yield name, parameter, ids.get(name)


class CheckpointReader:
    """Looks tensors up by parameter name and expert id, in whichever file they are."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = [safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))]
        self._file_of_key = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118
        self._states: dict[str, list[str]] = {}
        for key in self._file_of_key:
            name, state = key.split("|")[:2]
            if state not in self._states.setdefault(name, []):
                self._states[name].append(state)

    def check_states(self, *, moments: bool) -> None:
        """Raise UserError unless all parameters have the same states, and where ``moments``, more than masters."""
        states = {name: sorted(of) for name, of in self._states.items() if BUFFER not in of}
        expected = max(states.values(), key=len, default=[])
        for name, of in states.items():
            if of != expected or (moments and len(of) < 2):
                raise self._misfit(f"{name} has no optimizer state but {of}")

    def parameter(self, name: str, like: nn.Parameter, expert_ids: Sequence[int] | None) -> dict[str, Tensor]:
        """Master and optimizer states of a parameter, on its device, with its shape."""
        if name not in self._states:
            raise self._misfit(f"it has no parameter {name}")
        return {state: self._assemble(name, state, like, expert_ids) for state in self._states[name]}

    def fill_buffers(self, model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            buffer.copy_(self._get(f"{name}|{BUFFER}", buffer.shape))

    def _assemble(self, name: str, state: str, like: nn.Parameter, expert_ids: Sequence[int] | None) -> Tensor:
        shape = whole_shape(like)
        if expert_ids is None:
            return self._get(f"{name}|{state}", shape).to(like.device)
        experts = [self._get(f"{name}|{state}|{expert}", shape[1:]) for expert in expert_ids]
        return torch.stack(experts).to(like.device)

    def _get(self, key: str, shape: torch.Size) -> Tensor:
        if key not in self._file_of_key:
            raise self._misfit(f"it has no {key}")
        tensor = self._file_of_key[key].get_tensor(key)
        if tensor.shape != shape:
            raise self._misfit(f"{key} has shape {tuple(tensor.shape)} there and {tuple(shape)} here")
        return tensor

    def _misfit(self, reason: str) -> UserError:
        return UserError(
            f"checkpoint {self._directory} is not one of this model: {reason}; "
            "use the configuration with which it was written"
        )
