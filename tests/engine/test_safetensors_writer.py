"""Files written piece by piece are the library's own format, and a sealed one speaks for itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.engine.checkpoint.safetensors_writer import (
    TensorSpec,
    check_sealed,
    write_pieces,
    write_sealed,
    write_tensors,
)
from dist_moe.errors import UserError

TENSORS = {
    "odd": torch.tensor([1, 2, 3], dtype=torch.int8),
    "half": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(7),
    "matrix": torch.randn(4, 6),
    "turned": torch.randn(6, 4).T,
    "none": torch.empty(0, 3),
    "double": torch.randn(2).double(),
    "mask": torch.tensor([True, False]),
}


def test_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_tensors(path, TENSORS)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].equal(tensor), name


def pieces_of(name: str) -> Iterator[Tensor]:
    tensor = TENSORS[name]
    yield from tensor.split(1) if tensor.dim() else (tensor,)


def test_pieces_make_the_same_file(tmp_path: Path) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    assert write_pieces(tmp_path / "pieces", specs, pieces_of) == write_tensors(tmp_path / "whole", TENSORS)


@pytest.mark.parametrize("pieces", [[torch.zeros(3)], [torch.zeros(5)], [torch.zeros(4, dtype=torch.float16)], []])
def test_pieces_that_do_not_fit(tmp_path: Path, pieces: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="x "):
        write_pieces(tmp_path / "a", {"x": TensorSpec(torch.float32, (4,))}, lambda _: pieces)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    write_sealed(tmp_path / "sealed.safetensors", specs, pieces_of, {"step": "3", "note": "0" * 70})
    return tmp_path / "sealed.safetensors"


def test_a_sealed_file(sealed: Path) -> None:
    with safe_open(sealed, framework="pt") as file:
        assert file.metadata() == check_sealed(sealed)
        assert file.metadata()["note"] == "0" * 70
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in TENSORS.items())


def test_every_flipped_bit_is_found(sealed: Path) -> None:
    content = sealed.read_bytes()
    drawn = random.Random(0)
    for position in sorted(drawn.sample(range(len(content)), 300)) + list(range(8)):
        altered = bytearray(content)
        altered[position] ^= 1 << drawn.randrange(8)
        sealed.write_bytes(altered)
        with pytest.raises(UserError, match=sealed.name):
            check_sealed(sealed)


def test_what_is_no_sealed_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": 1}).encode()
    for content in (b"", b"\0" * 8, len(header).to_bytes(8, "little") + header, b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.safetensors is no file of"):
            check_sealed(path)
    write_tensors(path, TENSORS)
    with pytest.raises(UserError, match="__metadata__"):
        check_sealed(path)
    with pytest.raises(UserError, match="nowhere"):
        check_sealed(tmp_path / "nowhere")
