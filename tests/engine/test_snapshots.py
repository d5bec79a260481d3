"""Copies for a checkpoint: every bit, one bucket of the device's memory, few collectives, writers that take turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_moe.engine.checkpoint import files as checkpoint_files
from dist_moe.engine.checkpoint.format import DENSE_FILE, Key, TrainingHistory, expert_ids_by_parameter
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.checkpoint.models import read_model, write_model
from dist_moe.engine.checkpoint.saver import take_snapshot
from dist_moe.engine.deepspeed import parameter_state
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.parameter_state import MASTER, write_parameter_state
from dist_moe.engine.deepspeed.sharded_parameters import whole_shape
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import UserError
from tests.helpers.pool import on_ranks
from tests.helpers.runs import save_checkpoint
from tests.helpers.students import Student, student_engine
from tests.helpers.toys import toy_engine

RANKS, EP = 4, 2
BUCKET = 50
STATES = ["exp_avg", "exp_avg_sq", MASTER]
ADAM = {"type": "AdamW", "params": {"lr": 0.05}}


class Allocations(TorchDispatchMode):
    """Bytes of the memory that operations make anew, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (place := leaf.untyped_storage().data_ptr()) not in known:
                self.bytes[place] = leaf.untyped_storage().nbytes()
                self._alive.append(leaf)
        return result


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The sizes of the collectives that are issued inside."""
    sizes: list[int] = []
    original = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *arguments, **options)

    dist.all_reduce = count
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def known_states(name: str, parameter: nn.Parameter, ids: Any) -> dict[str, Tensor]:
    """Numbers that differ by parameter, state, place and expert, with every kind of bits among them."""
    shape = whole_shape(parameter)
    row = torch.arange(math.prod(shape if ids is None else shape[1:]), dtype=torch.float32)
    row[:4] = torch.tensor([-0.0, 1e-42, 3e38, -1.5])[: len(row[:4])]
    rows = [row + 1000.0 * expert for expert in ids] if ids is not None else [row + sum(map(ord, name)) % 97]
    for one in rows:
        one[0] = -0.0
    stacked = torch.stack(rows).view(shape)
    return {state: stacked * 2**number for number, state in enumerate(STATES)}


@dataclass(frozen=True)
class Taken:
    """A rank's part of a snapshot, the states it should be of, and what it cost."""

    files: dict[str, dict[str, Tensor]]
    expected: dict[str, Tensor]
    allocated: int
    collectives: list[int]
    largest: int


def snapshots(stages: list[int]) -> list[Taken]:
    parameter_state.BUCKET = BUCKET
    taken = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=EP)) as groups:
        for stage in stages:
            zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
            with student_engine(groups, Student(groups.world), ADAM, zero_optimization=zero) as engine:
                taken.append(snapshot(engine))
    return taken


def snapshot(engine: ExpertParallelEngine) -> Taken:
    parameters = {name: (parameter, ids) for name, parameter, ids in expert_ids_by_parameter(engine.module)}
    states = {name: known_states(name, *parameters[name]) for name in parameters}
    write_parameter_state(engine, STATES[:2], {"step": 3.0}, states.__getitem__)
    with counted_collectives() as collectives, Allocations() as allocations:
        files = take_snapshot(engine, 3, TrainingHistory(), {}).files
    host = {tensor.untyped_storage().data_ptr() for tensors in files.values() for tensor in tensors.values()}
    expected = {
        str(Key(name, state, expert)): tensor if expert is None else tensor[index]
        for name, (_, ids) in parameters.items()
        for state, tensor in states[name].items()
        for index, expert in enumerate([None] if ids is None else ids)
    }
    return Taken(
        files,
        expected,
        sum(size for place, size in allocations.bytes.items() if place not in host),
        collectives,
        max(whole_shape(parameter).numel() for parameter, _ in parameters.values()),
    )


@pytest.fixture(scope="module")
def taken() -> list[list[Taken]]:
    """By rank and stage."""
    return on_ranks(RANKS, snapshots, [0, 1, 2, 3])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_bit_is_there_once(taken: list[list[Taken]], stage: int) -> None:
    written = Counter(name for rank in taken for of_file in rank[stage].files.values() for name in of_file)
    expected = {name: tensor for rank in taken for name, tensor in rank[stage].expected.items()}
    assert {name: count for name, count in written.items() if not name.endswith("|buffer")} == dict.fromkeys(
        expected, 1
    )
    for rank in taken:
        for of_file in rank[stage].files.values():
            for name, tensor in of_file.items():
                if name in expected:
                    assert tensor.view(torch.int32).equal(expected[name].reshape(tensor.shape).view(torch.int32)), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_takes_one_bucket_of_memory_and_a_collective_for_each(taken: list[list[Taken]], stage: int) -> None:
    """All ranks issue the same collectives; at stage 0, where each has everything, there are none."""
    for rank in taken:
        assert rank[stage].largest > BUCKET / 2
        assert rank[stage].allocated <= 4 * BUCKET + 64
    dense = sum(t.numel() for name, t in taken[0][stage].expected.items() if name.count("|") == 1)
    experts = sum(t.numel() for name, t in taken[0][stage].expected.items() if name.count("|") == 2)
    buckets = math.ceil(dense / BUCKET) + math.ceil(experts / BUCKET)
    assert {len(rank[stage].collectives) for rank in taken} == {buckets if stage else 0}
    assert all(size <= BUCKET for rank in taken for size in rank[stage].collectives)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ranks_that_hold_an_expert_take_turns(taken: list[list[Taken]], stage: int) -> None:
    """Each writes half of its experts, with all of an expert's states, and the first rank what is dense."""
    for number, rank in enumerate(taken):
        assert (DENSE_FILE in rank[stage].files) == (number == 0)
        experts = {Key.parse(name).expert for name in rank[stage].files[f"experts-{number:05d}.safetensors"]}
        held = {Key.parse(name).expert for name in rank[stage].expected} - {None}
        assert (len(experts), len(held)) == (1, 2)
        assert experts < held


def reading(root: Path, stage: int) -> tuple[int, list[str]]:
    """Digests that this rank computes when it finds, reads and loads a checkpoint and reads an exported file."""
    digests: list[str] = []
    original = checkpoint_files.digest_of

    def count(path: Path) -> str:
        digests.append(path.name)
        return original(path)

    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=2)) as groups,
        toy_engine(groups, 4, optimizer=ADAM, zero_optimization={"stage": stage}) as engine,
    ):
        engine.backward(engine(1.0, [1.0] * 4))
        engine.step()
        save_checkpoint(engine, checkpoint_files.checkpoints_of(root), 1, keep=1)
        dist.barrier()
        checkpoint_files.digest_of = count
        try:
            found, _ = checkpoint_files.newest_good_checkpoint(root)
            weights = read_model(found)
            load_checkpoint(engine, found)
        finally:
            checkpoint_files.digest_of = original
    return len(weights), digests


def test_one_rank_of_a_node_reads_every_byte(tmp_path: Path) -> None:
    (names, first), (same, second) = on_ranks(2, reading, tmp_path, 1)
    assert names == same == 2
    assert sorted(set(first)) == [
        "dense.safetensors",
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "trainer.json",
    ]
    assert second == []


def test_a_file_is_read_whole_by_one_rank_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(nn.Linear(64, 64), tmp_path / "file", {})
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1
    (tmp_path / "file").write_bytes(content)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert list(read_model(tmp_path / "file")) == ["weight", "bias"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="torn or altered"):
        read_model(tmp_path / "file")
