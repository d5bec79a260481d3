"""Digests of data in memory: whatever changes a value, a type or an order changes them, and nothing else does."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_moe.data.batches import Table
from dist_moe.data.digests import digest_of_content


@dataclass(frozen=True)
class Rows:
    x: Any
    more: dict[str, Any] = field(default_factory=dict)


class Held:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.itself = self
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.x)


DIFFERENT: list[Any] = [
    None,
    0,
    0.0,
    False,
    "",
    b"",
    "0",
    [],
    [[]],
    [0],
    [0, 0],
    ["ab", "c"],
    ["a", "bc"],
    {},
    {"a": 1},
    ["a", 1],
    {"a": 2},
    {"b": 1},
    {1, 2},
    torch.zeros(()),
    torch.zeros(2),
    torch.zeros(1, 2),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.int64),
    torch.tensor([0.0, -0.0]),
    torch.tensor([1.0, 2.0]),
    torch.tensor([2.0, 1.0]),
    torch.tensor([1.0, float("nan")]),
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    np.zeros(2),
    np.zeros(2, np.float32),
    np.zeros((2, 1)),
    np.zeros(2, ">f8"),
    np.array(["a", None], dtype=object),
    np.array([[1], [2]], dtype=object),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
    Rows(1),
    Rows(1, {"a": torch.ones(1)}),
    Rows(2),
    Held(5),
    Held(6),
    Table((torch.arange(4),), torch.arange(4)),
    Table((torch.arange(4),), torch.arange(4).flip(0)),
]


def test_what_differs_has_different_digests() -> None:
    digests = [digest_of_content(value) for value in DIFFERENT]
    same = [pair for pair in itertools.combinations(range(len(digests)), 2) if digests[pair[0]] == digests[pair[1]]]
    assert [(DIFFERENT[one], DIFFERENT[other]) for one, other in same] == []


def test_what_is_the_same_has_the_same_digest(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    pairs: list[tuple[Any, Any]] = [
        (x.T, x.T.contiguous()),
        (x.requires_grad_(), torch.arange(12.0).view(3, 4)),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        (x.detach().numpy(), np.load(tmp_path / "x.npy", mmap_mode="r")),
        (np.arange(6)[::2], np.array([0, 2, 4])),
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
        ({"a", "b", "c"}, {"c", "b", "a"}),
        (Rows(Path("/here/x")), Rows(Path("/there/y"))),
        (Rows(len), Rows(len)),
        (Held([1, 2]), Held([1, 2])),
        (Table((x,), x), Table((x.clone(),), x.clone())),
    ]
    assert [one for one, other in pairs if digest_of_content(one) != digest_of_content(other)] == []
