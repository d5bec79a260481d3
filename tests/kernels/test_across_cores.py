"""Groups spread over the cores: each is done once, alone in its scratch memory, and failures come out."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_moe.kernels.across_cores import SMALLEST_WORTH_A_THREAD, across_cores

LARGE = 10 * SMALLEST_WORTH_A_THREAD


@pytest.fixture(autouse=True)
def _two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_groups(rows: list[int], work_per_row: int, together: tuple[int, ...]) -> dict[int, tuple[str, int]]:
    """Which thread did each group, and with how many threads at its disposal; two groups run ``together``."""
    seen: dict[int, tuple[str, int]] = {}
    both = threading.Barrier(2)

    def task(group: int, _: Tensor) -> None:
        assert group not in seen
        assert not torch.is_grad_enabled()
        seen[group] = (threading.current_thread().name, torch.get_num_threads())
        if group in together:
            both.wait(10)  # so that no thread takes both before the other has begun

    across_cores(task, rows, work_per_row, torch.empty(0))
    assert sorted(seen) == list(range(len(rows)))
    assert torch.get_num_threads() == 2
    return seen


def test_large_groups_go_to_two_threads_with_a_core_each() -> None:
    seen = threads_of_groups([5, 5], LARGE, together=(0, 1))
    assert len({name for name, _ in seen.values()}) == 2
    assert {threads for _, threads in seen.values()} == {1}


def test_small_groups_stay_with_the_caller() -> None:
    assert set(threads_of_groups([5, 5, 0], 1, together=()).values()) == {("MainThread", 2)}


def test_a_group_that_is_most_of_the_work_gets_all_cores() -> None:
    seen = threads_of_groups([1, 20, 1], LARGE, together=(0, 2))
    assert seen[1] == ("MainThread", 2)
    assert {seen[0][1], seen[2][1]} == {1}


def test_every_core_has_its_own_scratch() -> None:
    both = threading.Barrier(2)
    held: list[Tensor] = []

    def task(group: int, scratch: Tensor) -> None:
        held.append(scratch.fill_(group))
        both.wait(10)
        assert (scratch == group).all()

    across_cores(task, [3, 3], LARGE, torch.empty(0), 2, 4)
    assert held[0].shape == (2, 3, 4)


@pytest.mark.parametrize("fails_in", ["MainThread", "dist_moe_core_0"])
def test_a_failure_comes_out_from_whichever_thread(fails_in: str) -> None:
    both = threading.Barrier(2)

    def task(group: int, _: Tensor) -> None:
        both.wait(10)
        if threading.current_thread().name == fails_in:
            raise ArithmeticError("of a group")

    with pytest.raises(ArithmeticError, match="of a group"):
        across_cores(task, [3, 3], LARGE, torch.empty(0))
    assert torch.get_num_threads() == 2


def test_a_forked_process_makes_threads_of_its_own() -> None:
    across_cores(lambda group, scratch: None, [3, 3], LARGE, torch.empty(0))
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _in_child() -> None:
    done: list[int] = []
    across_cores(lambda group, _: done.append(group), [3, 3, 3], LARGE, torch.empty(0))
    assert sorted(done) == [0, 1, 2]


def test_scratch_is_for_the_largest_group_that_a_core_can_get() -> None:
    shapes: dict[int, tuple[int, ...]] = {}

    def task(group: int, scratch: Tensor) -> None:
        shapes[group] = tuple(scratch.shape)

    like = mock.Mock(wraps=torch.empty(0))
    like.device = torch.device("cpu")
    across_cores(task, [1, 20, 2], LARGE, like, 3, 4)
    assert like.new_empty.call_args_list == [mock.call(3, 20, 4), mock.call(3, 2, 4)]
    assert shapes[1] == (3, 20, 4)
    assert {shapes[0], shapes[2]} <= {(3, 20, 4), (3, 2, 4)}
    like.new_empty.reset_mock()
    across_cores(task, [1, 20, 2], 1, like, 3, 4)
    assert set(shapes.values()) == {(3, 20, 4)}
    assert like.new_empty.call_args_list == [mock.call(3, 20, 4)]
