"""Rewriting a checkpoint with its experts in another number of files, one expert in memory at a time.

No layout needs this: every checkpoint loads at any number of ranks. It is for file systems that like
few large files better, or many small ones.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from dist_moe.engine.checkpoint.files import partial_directory, publish, step_directory, verify_checkpoint
from dist_moe.engine.checkpoint.format import EXPERT_FILES, Key, expert_file
from dist_moe.engine.checkpoint.reader import CheckpointReader
from dist_moe.engine.checkpoint.safetensors_writer import write_pieces
from dist_moe.errors import UserError


def reshard_checkpoint(source: Path, root: Path, expert_files: int) -> Path:
    """Write ``source`` again as a checkpoint under ``root``, neighbouring experts in one of ``expert_files`` files.

    Returns the new checkpoint, which is verified against ``source`` tensor by tensor. For one process
    alone. Raises UserError if ``source`` is not intact, the number does not fit, or writing fails.
    """
    manifest = verify_checkpoint(source)
    reader = CheckpointReader(source)
    experts = max((entry.experts or 0 for entry in reader.entries.values()), default=0)
    if not 1 <= expert_files <= max(1, experts):
        raise UserError(f"--expert-files {expert_files}: the checkpoint has {experts} experts; 1 to {experts} files")
    final = step_directory(root, manifest.step)
    if final.exists():
        raise UserError(f"{final} exists already; name another --output")
    partial = partial_directory(final)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {name: digest for name, digest in manifest.files.items() if not name.startswith(EXPERT_FILES)}
        for name in files:
            shutil.copyfile(source / name, partial / name)
        for index, ids in enumerate(torch.arange(experts).tensor_split(expert_files) if experts else ()):
            files[expert_file(index)] = _write_experts(reader, ids.tolist(), partial / expert_file(index))
        publish(partial, final, replace(manifest, files=files))
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error}") from error
    _compare(reader, final)
    return final


def _write_experts(reader: CheckpointReader, ids: list[int], path: Path) -> str:
    entries = [entry for entry in reader.entries.values() if entry.experts is not None]
    keys = [Key(entry.name, state, expert) for entry in entries for state in entry.states for expert in ids]
    specs = {str(key): reader.spec(key) for key in keys}
    return write_pieces(path, specs, lambda key: (reader.read(Key.parse(key)),))


def _compare(reader: CheckpointReader, written: Path) -> None:
    """Check the digests, and every tensor by name; an error here is ours or the disk's."""
    verify_checkpoint(written)
    again = CheckpointReader(written)
    if again.entries != reader.entries:
        raise UserError(f"{written} does not hold what its source holds; remove it, and check the disk")
    for key in (key for entry in reader.entries.values() for state in entry.states for key in entry.keys(state)):
        ours, theirs = again.read(key), reader.read(key)
        if not ours.reshape(-1).view(torch.uint8).equal(theirs.reshape(-1).view(torch.uint8)):
            raise UserError(f"{written}: {key} is not what its source holds; remove it, and check the disk")
