"""The value that says where experts live."""

from __future__ import annotations

import pytest
import torch

from dist_moe.parallel import Placement, SingleWorld, expert_table, experts_of_rank, position_table


def test_positions_and_experts_are_inverse_and_shared_out_equally() -> None:
    placement = Placement((3, 0, 5, 1, 4, 2), 3)
    assert placement.position_of_expert == (1, 3, 5, 0, 4, 2)
    assert [placement.experts_of(rank) for rank in range(3)] == [(3, 0), (5, 1), (4, 2)]
    assert [placement.rank_of(expert) for expert in range(6)] == [0, 1, 2, 0, 2, 1]
    cpu = torch.device("cpu")
    assert position_table(placement, cpu)[expert_table(placement, cpu)].tolist() == list(range(6))


def test_the_identity_is_contiguous() -> None:
    identity = Placement.identity(8, 4)
    assert [identity.experts_of(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert identity.is_identity
    assert not Placement((1, 0, 2, 3), 2).is_identity
    assert Placement.identity(5, 1).experts_of(0) == tuple(experts_of_rank(5, SingleWorld()))


@pytest.mark.parametrize(
    ("experts", "ranks", "message"),
    [
        ((0, 1, 2), 2, "num_experts=3 is not divisible by the 2 ranks"),
        ((), 1, "num_experts=0 is not divisible"),
        ((0, 1), 0, "not divisible by the 0 ranks"),
        ((0, 0), 2, r"must name each expert 0\.\.1 once, got \[0, 0\]"),
        ((1, 2), 1, "must name each expert"),
        ((-1, 0), 1, "must name each expert"),
    ],
)
def test_what_is_no_placement_is_refused(experts: tuple[int, ...], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(experts, ranks)


def test_a_digest_tells_placements_apart() -> None:
    placements = [Placement((0, 1, 2, 3), 2), Placement((0, 1, 2, 3), 4), Placement((1, 0, 2, 3), 2)]
    assert len({placement.digest for placement in placements}) == 3
    assert Placement((0, 1, 2, 3), 2).digest == Placement.identity(4, 2).digest


def test_experts_that_move_are_those_whose_rank_changes() -> None:
    before = Placement.identity(6, 2)
    assert before.moved_to(Placement((2, 1, 0, 3, 5, 4), 2)) == ()
    assert before.moved_to(Placement((2, 1, 4, 3, 5, 0), 2)) == (0, 4)
