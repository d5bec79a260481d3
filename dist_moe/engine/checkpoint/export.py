"""A model in one file, and back: weights and buffers by name, experts stacked by global id.

The file is plain safetensors. Its metadata hold the resolved configuration (JSON), the step, what each
tensor is, and a sha256 over the file itself. Optimizer state stays behind. Nothing here needs a process
group, and no more than one expert's tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_moe.engine.checkpoint.catalog import Catalog, Entry
from dist_moe.engine.checkpoint.files import Manifest, partial_directory, publish, step_directory, verify_checkpoint
from dist_moe.engine.checkpoint.reader import BUFFER, expert_ids_by_parameter
from dist_moe.engine.checkpoint.snapshot import DENSE_FILE, TrainerState, expert_file
from dist_moe.engine.checkpoint.tensor_file import TensorSpec, check_sealed, write_pieces, write_sealed, write_tensors
from dist_moe.engine.deepspeed.parameter_state import MASTER
from dist_moe.errors import UserError

DENSE, EXPERTS = "dense", "experts"
EXPORT_FORMAT = "dist_moe weights 1"


@dataclass(frozen=True)
class Exported:
    """What an exported file says of itself. ``kinds``: "dense", "experts" (axis 0 is the expert's global
    id) or "buffer", by tensor name. ``dtype``: of the parameters. ``digest``: the file's sha256."""

    path: Path
    configuration: dict[str, Any]
    step: int
    kinds: dict[str, str]
    dtype: str
    digest: str


def export_checkpoint(
    directory: Path, path: Path, configuration: dict[str, Any], num_experts: int, dtype: torch.dtype = torch.float32
) -> Exported:
    """Write the masters and buffers of a checkpoint into ``path``; parameters as ``dtype``, buffers as they are.

    Raises UserError if the checkpoint is not intact or has not all of ``num_experts`` experts, or if
    ``path`` exists or cannot be written.
    """
    manifest = verify_checkpoint(directory)
    if path.exists():
        raise UserError(f"{path} exists already; name another file")
    catalog = Catalog(directory)
    for entry in catalog.entries.values():
        if entry.experts not in (None, num_experts):
            raise UserError(f"checkpoint {directory} has {entry.experts} experts of {entry.name}, not {num_experts}")
    specs = {name: _spec(entry, dtype) for name, entry in catalog.entries.items()}

    def pieces(name: str) -> Iterator[Tensor]:
        entry = catalog.entries[name]
        for piece in catalog.pieces(entry, entry.states[0]):
            yield piece.to(specs[name].dtype)

    metadata = {
        "format": EXPORT_FORMAT,
        "configuration": json.dumps(configuration),
        "step": str(manifest.step),
        "dtype": str(dtype).removeprefix("torch."),
        "kinds": json.dumps({name: _kind(entry) for name, entry in catalog.entries.items()}),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_sealed(partial, specs, pieces, metadata)
        os.rename(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from error
    return read_exported(path)


def read_exported(path: Path) -> Exported:
    """What a file is, its digest checked. Raises UserError unless it is a whole file of 'dist-moe export'."""
    metadata = check_sealed(path)
    if metadata.get("format") != EXPORT_FORMAT:
        raise UserError(
            f"{path} has the format {metadata.get('format')!r}; this version of dist_moe reads {EXPORT_FORMAT!r}"
        )
    return Exported(
        path,
        json.loads(metadata["configuration"]),
        int(metadata["step"]),
        json.loads(metadata["kinds"]),
        metadata["dtype"],
        metadata["sha256"],
    )


@torch.no_grad()
def load_exported(model: nn.Module, path: Path) -> Exported:
    """Bring an exported file into a bare model, which may hold any part of the experts. Needs no process group.

    Raises UserError if the file is torn or of another model.
    """
    exported = read_exported(path)
    parameters = list(expert_ids_by_parameter(model))
    wanted = {name for name, _, _ in parameters} | {name for name, _ in model.named_buffers()}
    if wanted != exported.kinds.keys():
        names = sorted(wanted ^ exported.kinds.keys())
        raise _misfit(path, f"only one of the two has {', '.join(names)}")
    with safe_open(path, framework="pt") as file:
        for name, parameter, expert_ids in parameters:
            _fill_parameter(file, path, name, parameter, expert_ids)
        for name, buffer in model.named_buffers():
            _check_shape(path, name, tuple(file.get_slice(name).get_shape()), tuple(buffer.shape))
            buffer.copy_(file.get_tensor(name))
    return exported


def import_checkpoint(path: Path, root: Path) -> tuple[Path, Exported]:
    """Make an exported file a checkpoint of step 0 under ``root``: masters widened to fp32, buffers as they are.

    It has no optimizer state, and says so: an optimizer begins with it as at a run's first step.
    Raises UserError if the file is torn or the checkpoint cannot be written.
    """
    exported = read_exported(path)
    final = _publish_first(root, f"{path.name} ({exported.digest[:12]})", lambda to: _write_imported(exported, to))
    return final, exported


def first_checkpoint(model: nn.Module, root: Path, imported_from: str) -> Path:
    """Make a whole model a checkpoint of step 0 under ``root``: masters in fp32, buffers as they are.

    Like that of :func:`import_checkpoint`. ``imported_from``: where its weights are from. Raises UserError.
    """
    files: dict[str, dict[str, Tensor]] = {DENSE_FILE: {}, expert_file(0): {}}
    for name, parameter, expert_ids in expert_ids_by_parameter(model):
        master = parameter.detach().float()
        if expert_ids is None:
            files[DENSE_FILE][f"{name}|{MASTER}"] = master
        else:
            files[expert_file(0)] |= {f"{name}|{MASTER}|{e}": master[i] for i, e in enumerate(expert_ids)}
    files[DENSE_FILE] |= {f"{name}|{BUFFER}": buffer for name, buffer in model.named_buffers()}

    def write(directory: Path) -> dict[str, str]:
        return {name: write_tensors(directory / name, tensors) for name, tensors in files.items() if tensors}

    return _publish_first(root, imported_from, write)


def _publish_first(root: Path, imported_from: str, write: Callable[[Path], dict[str, str]]) -> Path:
    """A checkpoint of step 0 whose tensors ``write`` writes into a directory, giving their files' digests."""
    final = step_directory(root, 0)
    partial = partial_directory(final)
    trainer = TrainerState(0, {}, [], None, imported_from=imported_from)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = write(partial) | trainer.write(partial)
        publish(partial, final, Manifest(0, files))
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error}") from error
    return final


def _write_imported(exported: Exported, directory: Path) -> dict[str, str]:
    digests = {}
    with safe_open(exported.path, framework="pt") as file:
        for name in (DENSE_FILE, expert_file(0)):
            of_experts = name != DENSE_FILE
            specs = dict(_imported_specs(file, exported, of_experts=of_experts))
            if specs:
                digests[name] = write_pieces(directory / name, specs, lambda key: _imported_pieces(file, key))
    return digests


def _imported_specs(file: Any, exported: Exported, *, of_experts: bool) -> Iterator[tuple[str, TensorSpec]]:
    for name, kind in exported.kinds.items():
        shape = tuple(file.get_slice(name).get_shape())
        if of_experts and kind == EXPERTS:
            yield from ((f"{name}|{MASTER}|{e}", TensorSpec(torch.float32, shape[1:])) for e in range(shape[0]))
        elif not of_experts and kind == DENSE:
            yield f"{name}|{MASTER}", TensorSpec(torch.float32, shape)
        elif not of_experts and kind == BUFFER:
            yield f"{name}|{BUFFER}", TensorSpec.of(file.get_tensor(name))


def _imported_pieces(file: Any, key: str) -> Iterable[Tensor]:
    name, state, *expert = key.split("|")
    tensor = file.get_slice(name)[int(expert[0])] if expert else file.get_tensor(name)
    return (tensor if state == BUFFER else tensor.float(),)


def _fill_parameter(file: Any, path: Path, name: str, parameter: nn.Parameter, expert_ids: Any) -> None:
    part = file.get_slice(name)
    shape = tuple(part.get_shape())
    if expert_ids is None:
        _check_shape(path, name, shape, tuple(parameter.shape))
        parameter.copy_(file.get_tensor(name))
        return
    _check_shape(path, name, shape[1:], tuple(parameter.shape[1:]))
    if max(expert_ids) >= shape[0]:
        raise _misfit(path, f"{name} has {shape[0]} experts there, the model has expert {max(expert_ids)}")
    for index, expert in enumerate(expert_ids):
        parameter[index].copy_(part[expert])


def _spec(entry: Entry, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(entry.dtype if entry.is_buffer else dtype, entry.stacked_shape)


def _kind(entry: Entry) -> str:
    return BUFFER if entry.is_buffer else DENSE if entry.experts is None else EXPERTS


def _check_shape(path: Path, name: str, there: tuple[int, ...], here: tuple[int, ...]) -> None:
    if there != here:
        raise _misfit(path, f"{name} has shape {there} there and {here} here")


def _misfit(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not of this model: {reason}; use the configuration in its metadata")
