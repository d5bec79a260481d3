"""Descriptions of run directories, checkpoints and exported files, as text. Needs no process group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_moe.engine.checkpoint.files import best_of, checkpoints_of, complete_directories, verify_checkpoint
from dist_moe.engine.checkpoint.format import BUFFER, MANIFEST, Manifest, read_trainer_state
from dist_moe.engine.checkpoint.models import read_model
from dist_moe.engine.checkpoint.reader import CheckpointReader
from dist_moe.engine.checkpoint.safetensors_writer import DTYPE_NAMES
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Inspection:
    """The result of looking into a path. ``text``: for a person. ``errors``: what is damaged."""

    text: str
    errors: list[str]


def inspect_path(path: Path) -> Inspection:
    """Look into a run directory, a checkpoint or an exported file, all digests checked.

    Raises UserError if it is none of them.
    """
    if path.is_file():
        return _inspect_exported(path)
    if (path / MANIFEST).exists():
        return _inspect_checkpoint(path)
    found = [*complete_directories(checkpoints_of(path)), *complete_directories(best_of(checkpoints_of(path)))]
    if not found:
        raise UserError(f"{path} is neither a run directory with checkpoints, nor a checkpoint, nor an exported file")
    return _inspect_run(path, found)


def _inspect_run(run: Path, directories: list[Path]) -> Inspection:
    rows, errors = [], []
    last_good: Path | None = None
    for directory in directories:
        name = str(directory.relative_to(run))
        size = _size(sum(file.lstat().st_size for file in directory.iterdir()))
        try:
            manifest = verify_checkpoint(directory)
        except UserError as error:
            errors.append(str(error))
            rows.append([name, "-", "-", size, "DAMAGED"])
        else:
            rows.append([name, str(manifest.step), _layout(manifest), size, "ok"])
            last_good = directory if directory.parent == checkpoints_of(run) else last_good or directory
    text = table(["checkpoint", "step", "written at", "size", "digests"], rows)
    if last_good is not None:
        text += f"\n\n{last_good.relative_to(run)}:\n{_inspect_checkpoint(last_good).text}"
    return Inspection(text, errors)


def _inspect_checkpoint(directory: Path) -> Inspection:
    try:
        manifest = verify_checkpoint(directory)
    except UserError as error:
        return Inspection(f"{directory}: DAMAGED", [str(error)])
    trainer = read_trainer_state(directory)
    entries = CheckpointReader(directory).entries.values()
    numels = [(entry, torch.Size(entry.stacked_shape).numel()) for entry in entries]
    parameters = sum(numel for entry, numel in numels if entry.kind != BUFFER)
    expert_parameters = sum(numel for entry, numel in numels if entry.experts)
    facts = [
        f"step {manifest.step}, format {manifest.format_version}, written at {_layout(manifest)}",
        f"{parameters:,} parameters, {expert_parameters:,} of them in experts; {len(trainer.validation_losses)} "
        f"validation(s), {trainer.training_seconds:.0f} s of training",
    ]
    if trainer.imported_from:
        facts.append(f"imported from {trainer.imported_from}: no optimizer state")
    rows = [
        [
            entry.name,
            f"{entry.experts} experts" if entry.experts else entry.kind,
            str(entry.spec.shape),
            str(entry.spec.dtype).removeprefix("torch."),
            " ".join(entry.states),
            _size(entry.num_bytes),
        ]
        for entry in entries
    ]
    files = [
        [name, _size((directory / name).stat().st_size), digest[:12], "ok"] for name, digest in manifest.files.items()
    ]
    parts = [
        *facts,
        "",
        table(["parameter", "kind", "shape", "dtype", "states", "size"], rows),
        "",
        table(["file", "size", "sha256", "digest"], files),
    ]
    return Inspection("\n".join(parts), [])


def _inspect_exported(path: Path) -> Inspection:
    exported = read_model(path)
    specs = exported.specs
    rows = [
        [name, kind, str(specs[name].shape), DTYPE_NAMES[specs[name].dtype]] for name, kind in exported.kinds.items()
    ]
    size, digest = _size(path.stat().st_size), exported.digest[:12]
    facts = f"weights of step {exported.step}, {exported.dtype}, {size}, sha256 {digest}: ok"
    return Inspection(f"{facts}\n\n{table(['tensor', 'kind', 'shape', 'dtype'], rows)}", [])


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return rows under a head, in columns as wide as they must be."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _layout(manifest: Manifest) -> str:
    if manifest.layout is None:
        return "no layout"
    layout = manifest.layout
    return f"{layout.world_size} rank(s), EP {layout.expert_parallel_size}, ZeRO {layout.zero_stage}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
