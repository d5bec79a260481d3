"""Bare models on disk: weights and buffers by name, experts by global id, at any layout.

    weights = read_model(path)               a checkpoint or an exported file, lazily
    place_weights(model, weights)            into a model that holds any share of the experts
    write_model(model, path, configuration)  an exported file

An exported file is plain safetensors, with experts stacked along axis 0. Its metadata hold the resolved configuration
(JSON), the step, what each tensor is, and a sha256 over the file itself. Optimizer state stays behind. Nothing here
needs an engine or a process group, and no more than one expert's tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_moe.config.files import json_line
from dist_moe.config.settings import LARGEST_STEP
from dist_moe.engine.checkpoint.files import (
    partial_directory,
    publish,
    reads_all,
    step_directory,
    verify_checkpoint,
)
from dist_moe.engine.checkpoint.format import (
    BUFFER,
    DENSE,
    DENSE_FILE,
    EXPERTS,
    IDENTITY,
    Key,
    Manifest,
    TrainerState,
    expert_file,
    expert_ids_by_parameter,
)
from dist_moe.engine.checkpoint.loading import read_trainer_state
from dist_moe.engine.checkpoint.reader import CheckpointReader
from dist_moe.engine.checkpoint.safetensors_writer import (
    SEAL,
    TensorSpec,
    check_sealed,
    spec_in_file,
    write_pieces,
    write_sealed,
)
from dist_moe.engine.deepspeed.parameter_state import MASTER
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank

EXPORT_FORMAT = "dist_moe weights 1"
ROUTERS = (".gates.", ".slot_map.")
"""Parts of the names of parameters that choose experts."""


@dataclass(frozen=True, eq=False)
class ModelWeights(Mapping[str, Tensor]):
    """Weights and buffers of a whole model by name, each read when it is asked for.

    ``kinds``: DENSE, EXPERTS (axis 0 is the expert's global id) or BUFFER, by name. ``specs``: dtype and shape, by
    name. ``read``: (name, None) -> the tensor, (name, expert) -> one expert's part of it. ``path``: the checkpoint or
    exported file, None in memory. ``configuration``, ``digest``: of an exported file, its model's configuration and
    its sha256. ``identity``: what the run that wrote them says of its data, as JSON can hold it.
    """

    kinds: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    read: Callable[[str, int | None], Tensor] = field(repr=False)
    path: Path | None = None
    step: int = 0
    configuration: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(list(self.pieces(name))) if self.kinds[name] == EXPERTS else self.read(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def dtype(self) -> str:
        """The dtype of the parameters, as torch names it."""
        dtypes = {str(self.specs[name].dtype).removeprefix("torch.") for name in self if self.kinds[name] != BUFFER}
        return ", ".join(sorted(dtypes))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield one expert's part after the other, or the whole of what is no expert's."""
        if self.kinds[name] == EXPERTS:
            yield from (self.read(name, expert) for expert in range(self.specs[name].shape[0]))
        else:
            yield self.read(name, None)

    def content_digest(self) -> str:
        """Return a sha256 over names, shapes and values, the same whatever layout wrote them and in which files."""
        sha256 = hashlib.sha256()
        for name in sorted(self):
            sha256.update(f"{name} {self.kinds[name]} {self.specs[name]}\n".encode())
            for piece in self.pieces(name):
                sha256.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha256.hexdigest()

    def check_num_experts(self, num_experts: Collection[int]) -> None:
        """Raise UserError unless every bank has one of ``num_experts`` experts."""
        for name, kind in self.kinds.items():
            if kind == EXPERTS and self.specs[name].shape[0] not in num_experts:
                wanted = " or ".join(map(str, num_experts))
                raise UserError(
                    f"checkpoint {self.path} has {self.specs[name].shape[0]} experts of {name}, not {wanted}"
                )


def read_model(path: Path) -> ModelWeights:
    """Open the weights of a checkpoint (its masters, in fp32) or of an exported file, all digests checked.

    Raises UserError if it is neither, or not intact.
    """
    return _read_file(path) if path.is_file() else _read_checkpoint(path)


def weights_of(model: nn.Module) -> ModelWeights:
    """Return the weights of a model in memory, as views. Raises ValueError unless it holds all of its experts."""
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    ids_of = {name: ids for name, _, ids in expert_ids_by_parameter(model) if ids is not None}
    for name, bank in model.named_modules():
        if isinstance(bank, ExpertBank) and len(bank.expert_ids) < bank.num_experts:
            raise ValueError(f"{name} holds the experts {bank.expert_ids} of {bank.num_experts} only")

    def read(name: str, expert: int | None) -> Tensor:
        tensor = tensors[name].detach()
        return tensor if expert is None else tensor[list(ids_of[name]).index(expert)]

    kinds = {name: EXPERTS if name in ids_of else DENSE for name, _ in model.named_parameters()}
    kinds |= {name: BUFFER for name, _ in model.named_buffers()}
    return ModelWeights(kinds, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, read)


@torch.no_grad()
def place_weights(model: nn.Module, weights: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> None:
    """Copy ``weights``, experts stacked along axis 0 by global id, into a model with any share of the experts.

    All buffers of :class:`ModelWeights` are copied as well, those that are there of other mappings. ``fresh``: parts
    of the names of parameters that keep their first values where ``weights`` has none of them. Parameters without
    storage (of a plan) stay so. Raises UserError naming every parameter that ``weights`` lacks, has in excess or has
    in another shape; nothing is changed then.
    """
    bank_of = {id(p): bank for bank in model.modules() if isinstance(bank, ExpertBank) for p in bank.parameters()}
    parameters = dict(model.named_parameters())
    given = weights if isinstance(weights, ModelWeights) else _in_memory(weights)
    places = parameters | dict(model.named_buffers())
    wanted = places if isinstance(weights, ModelWeights) else parameters
    misfits = [f"it has no {name}" for name in wanted.keys() - weights if not any(part in name for part in fresh)]
    misfits += [f"the model has no {name}" for name in weights.keys() - places]
    common = places.keys() & weights.keys()
    for name in common:
        bank, shape = bank_of.get(id(places[name])), tuple(places[name].shape)
        expected = shape if bank is None else (bank.num_experts, *shape[1:])
        if given.specs[name].shape != expected:
            misfits.append(f"{name} has shape {given.specs[name].shape}, the model's is {expected}")
        elif given.specs[name].dtype.is_floating_point != places[name].dtype.is_floating_point:
            misfits.append(f"{name} is {given.specs[name].dtype}, the model's is {places[name].dtype}")
    if misfits:
        subject = "these weights are" if given.path is None else f"{given.path} is"
        remedy = "" if given.path is None else "; use the configuration with which it was written"
        raise UserError(f"{subject} not of this model: {'; '.join(sorted(misfits))}{remedy}")
    for name in common:
        bank = bank_of.get(id(places[name]))
        if bank is None:
            places[name].copy_(given.read(name, None))
        else:
            for index, expert in enumerate(bank.expert_ids):
                places[name][index].copy_(given.read(name, expert))


def write_model(
    source: nn.Module | ModelWeights, path: Path, configuration: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> ModelWeights:
    """Write an exported file, parameters as ``dtype``, buffers as they are; return what it holds.

    ``configuration``: of the model, for whoever reads the file. Raises UserError if ``path`` exists or cannot be
    written, and ValueError for a model without all of its experts.
    """
    weights = source if isinstance(source, ModelWeights) else weights_of(source)
    if path.exists():
        raise UserError(f"{path} exists already; name another file")
    specs = {
        name: spec if weights.kinds[name] == BUFFER else TensorSpec(dtype, spec.shape)
        for name, spec in weights.specs.items()
    }
    metadata = {
        "format": EXPORT_FORMAT,
        "configuration": json_line(configuration),
        "step": str(weights.step),
        "dtype": str(dtype).removeprefix("torch."),
        "kinds": json_line(dict(weights.kinds)),
        "identity": json_line(dict(weights.identity)),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_sealed(
            partial, specs, lambda name: (t.to("cpu", specs[name].dtype) for t in weights.pieces(name)), metadata
        )
        os.rename(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from error
    return _read_file(path)


def write_first_checkpoint(
    source: nn.Module | ModelWeights, root: Path, imported_from: str, identity: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint of step 0 under ``root``, masters in fp32, buffers as they are; return its directory.

    It has no optimizer state, and says so: an optimizer begins with it as at a run's first step. ``imported_from``:
    where the weights are from. ``identity``: of the run that begins with it, see ModelWeights. Raises UserError if it
    cannot be written, and ValueError for a model without all of its experts.
    """
    weights = source if isinstance(source, ModelWeights) else weights_of(source)
    specs: dict[str, dict[str, TensorSpec]] = {DENSE_FILE: {}, expert_file(0): {}}
    for name, kind in weights.kinds.items():
        dtype, shape = weights.specs[name].dtype, weights.specs[name].shape
        if kind == EXPERTS:
            part = TensorSpec(torch.float32, shape[1:])
            specs[expert_file(0)] |= {str(Key(name, MASTER, expert)): part for expert in range(shape[0])}
        elif kind == DENSE:
            specs[DENSE_FILE][str(Key(name, MASTER))] = TensorSpec(torch.float32, shape)
        else:
            specs[DENSE_FILE][str(Key(name, BUFFER))] = TensorSpec(dtype, shape)

    def pieces(text: str) -> Sequence[Tensor]:
        key = Key.parse(text)
        tensor = weights.read(key.name, key.expert).cpu()
        return (tensor if key.state == BUFFER else tensor.float(),)

    final = step_directory(root, 0)
    partial = partial_directory(final)
    callbacks = {IDENTITY: dict(identity)} if identity else {}
    trainer = TrainerState(0, {}, 0, imported_from=imported_from, callbacks=callbacks)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {name: write_pieces(partial / name, of_file, pieces) for name, of_file in specs.items() if of_file}
        publish(partial, final, Manifest(0, files | trainer.write(partial)))
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error}") from error
    return final


def _read_checkpoint(directory: Path) -> ModelWeights:
    manifest, reader = verify_checkpoint(directory), CheckpointReader(directory)
    entries = reader.entries

    def read(name: str, expert: int | None) -> Tensor:
        return reader.read(Key(name, entries[name].states[0], expert))  # the master, or the buffer

    kinds = {name: entry.kind for name, entry in entries.items()}
    specs = {name: TensorSpec(entry.spec.dtype, entry.stacked_shape) for name, entry in entries.items()}
    identity = read_trainer_state(directory).identity
    return ModelWeights(kinds, specs, read, directory, manifest.step, identity=identity)


def _read_file(path: Path) -> ModelWeights:
    metadata = check_sealed(path, whole=reads_all())
    if metadata.get("format") != EXPORT_FORMAT:
        raise UserError(
            f"{path} has the format {metadata.get('format')!r}; this version of dist_moe reads {EXPORT_FORMAT!r}"
        )
    try:
        file = safe_open(path, framework="pt")
        kinds = _JSON_OF_KINDS.validate_json(metadata["kinds"])
        configuration = _JSON_OF_CONFIGURATION.validate_json(metadata["configuration"])
        identity = _JSON_OF_CONFIGURATION.validate_json(metadata.get("identity", "{}"))
        specs = {name: spec_in_file(file, name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        if kinds.keys() != specs.keys():
            raise ValueError(f"its kinds are of other tensors: {sorted(kinds.keys() ^ specs.keys())[:3]}")
        step = _STEP.validate_strings(metadata["step"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{path} is no file of 'dist-moe export', though intact: {reason}") from error

    def read(name: str, expert: int | None) -> Tensor:
        tensor: Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        return tensor

    weights = ModelWeights(kinds, specs, read, path, step, configuration, metadata[SEAL], identity)
    if reads_all():
        _check_finite(weights)
    return weights


_JSON_OF_KINDS = TypeAdapter(dict[str, Literal["dense", "experts", "buffer"]])
_JSON_OF_CONFIGURATION = TypeAdapter(dict[str, Any])
_STEP = TypeAdapter(Annotated[int, Field(ge=0, le=LARGEST_STEP)])


def _check_finite(weights: ModelWeights) -> None:
    """Raise UserError naming the parameters that are not finite, or no floating-point numbers."""
    parameters = [name for name, kind in weights.kinds.items() if kind != BUFFER]
    wrong = [name for name in parameters if not all(bool(piece.isfinite().all()) for piece in weights.pieces(name))]
    wrong += [name for name in parameters if not weights.specs[name].dtype.is_floating_point]
    if wrong:
        raise UserError(f"{weights.path} holds numbers that are not finite, or no floating-point ones: {wrong[:5]}")


def _in_memory(tensors: Mapping[str, Tensor]) -> ModelWeights:
    """Return ``tensors`` as weights of unknown kinds."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return ModelWeights({}, specs, lambda name, expert: tensors[name] if expert is None else tensors[name][expert])
