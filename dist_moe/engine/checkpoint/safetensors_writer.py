"""Writing safetensors files piece by piece: never more than one piece in memory, one digest on the way.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes with the length of a JSON
header, the header, and the tensors' bytes one after the other. The library's own writer wants all
tensors at once, and its file read again for a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dist_moe.config.files import json_line
from dist_moe.errors import UserError

SEAL = "sha256"
"""The metadata field of a sealed file: the digest of the file as it is with zeros in that field."""

_UNSEALED = "0" * 64
_BLOCK = 1 << 20
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names, in the order in which the library writes tensors: every one is aligned."""
_ORDER = list(DTYPE_NAMES)
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return those of ``tensor``."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def spec_in_file(file: Any, name: str) -> TensorSpec:
    """Return the spec of a tensor in an open safetensors file, without reading it. Raises ValueError."""
    part = file.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise ValueError(f"{name} has the dtype {part.get_dtype()}; allowed: {', '.join(_DTYPES)}")
    return TensorSpec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))


Pieces = Callable[[str], Iterable[Tensor]]
"""From a tensor's name to pieces of it along axis 0, in order; a piece is dropped before the next is asked for."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write whole tensors (on the CPU) and flush them to disk; return the file's sha256. Raises OSError."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return write_pieces(path, specs, lambda name: (tensors[name],))


def write_pieces(
    path: Path, specs: Mapping[str, TensorSpec], pieces: Pieces, metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors that come in pieces and flush them to disk; return the file's sha256.

    Raises OSError, and ValueError for pieces that do not fit.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in _blocks(specs, pieces, metadata or {}):
            digest.update(block)
            file.write(block)
        _flush(file)
    return digest.hexdigest()


def write_sealed(path: Path, specs: Mapping[str, TensorSpec], pieces: Pieces, metadata: Mapping[str, str]) -> str:
    """:func:`write_pieces` with the digest inside, under SEAL of the metadata, so that the file speaks for itself."""
    digest = write_pieces(path, specs, pieces, {SEAL: _UNSEALED, **metadata})
    with path.open("r+b") as file:
        header = _read_header(file)
        file.seek(8 + header.index(_UNSEALED.encode()))
        file.write(digest.encode())
        _flush(file)
    return digest


def check_sealed(path: Path, *, whole: bool = True) -> dict[str, str]:
    """Return the metadata of a sealed file. Raises UserError naming the file unless it is intact.

    ``whole``: read every byte of it; else its head alone.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            metadata: dict[str, str] = json.loads(header)["__metadata__"]
            seal = metadata[SEAL]
            if not whole:
                return metadata
            digest = hashlib.sha256(len(header).to_bytes(8, "little"))
            digest.update(header.replace(seal.encode(), _UNSEALED.encode(), 1))
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no file of 'dist-moe export': {type(error).__name__}: {error}") from error
    if digest.hexdigest() != seal:
        raise UserError(f"{path} is torn or altered: its contents do not have the sha256 that it names")
    return metadata


def _read_header(file: BinaryIO) -> bytes:
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if not 0 < length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return file.read(length)


def _blocks(
    specs: Mapping[str, TensorSpec], pieces: Pieces, metadata: Mapping[str, str]
) -> Iterable[bytes | memoryview]:
    names = sorted(specs, key=lambda name: (_ORDER.index(specs[name].dtype), name))
    header = _header({name: specs[name] for name in names}, metadata)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        written = 0
        for piece in pieces(name):
            if piece.dtype != specs[name].dtype:
                raise ValueError(f"{name} is to be {specs[name].dtype}, a piece is {piece.dtype}")
            block = _bytes_of(piece)
            written += len(block)
            yield block
        if written != specs[name].num_bytes:
            raise ValueError(f"{name} has {written} bytes, announced were {specs[name].num_bytes}")


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, spec in specs.items():
        end = start + spec.num_bytes
        content[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json_line(content, blanks=False).encode()  # as the library writes it, to the byte
    return text + b" " * (-len(text) % 8)


def _bytes_of(tensor: Tensor) -> memoryview:
    assert sys.byteorder == "little", "safetensors files are little-endian"
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
