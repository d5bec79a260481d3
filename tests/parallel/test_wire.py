"""Rows that travel rounded: what arrives, how far it may be off, what is counted, in every exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.parallel import (
    WIRES,
    EmulatedWorld,
    ExchangeOptions,
    ProcessWorld,
    SingleWorld,
    Traffic,
    World,
    combine,
    dispatch,
    plan_dispatch,
)
from dist_moe.parallel.wire import BF16_ROWS, FP8_ROWS, RowFormat, decoded, encoded
from tests.helpers.oracle import assert_all_same
from tests.helpers.worlds import both_kinds, in_nodes, run_worlds
from tests.layer.cases import Case
from tests.parallel.shares import shares_of, step

FORMATS = {"bf16": BF16_ROWS, "fp8": FP8_ROWS}
ERROR = {"bf16": 2.0**-8, "fp8_e4m3": 2.0**-4}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
COUNTS = [[2, 0, 3, 1], [0, 0, 4, 0], [1, 5, 0, 0], [0, 0, 0, 0]]


def there_and_back(x_ND: Tensor, form: RowFormat) -> Tensor:
    return decoded(encoded(x_ND, form), form, x_ND)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_a_row_is_that_of_its_format(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes_N1 = torch.logspace(-30, 30, 61).unsqueeze(1)
    x_ND = (torch.randn(61, 64, generator=generator) * sizes_N1).to(dtype)
    back_ND = there_and_back(x_ND, FORMATS[name])
    assert back_ND.dtype == dtype
    error_ND, allowed = (back_ND - x_ND).abs(), {"bf16": 2.0**-8, "fp8": 2.0**-4}[name]
    floor_N1 = 2.0**-17 * x_ND.abs().amax(dim=1, keepdim=True)
    assert (error_ND <= torch.maximum(allowed * x_ND.abs(), floor_N1)).all()
    if name == "fp8" or dtype.itemsize > 2:
        assert error_ND.max() > 0


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_format_can_hold_arrives_exactly(name: str) -> None:
    numbers_D = torch.tensor([0.0, 1.0, -1.125, 240.0, -0.0625, 3.5, 2.0**-6])
    x_ND = numbers_D * 2.0 ** torch.tensor([-60, -3, 0, 5, 60]).unsqueeze(1)
    for rows in (x_ND, x_ND[:, :6].unflatten(1, (2, 3))):  # rows with more than one axis, too
        assert torch.equal(there_and_back(rows, FORMATS[name]), rows)
    assert there_and_back(x_ND[:0], FORMATS[name]).shape == (0, 7)
    assert torch.equal(there_and_back(torch.zeros(2, 3), FORMATS[name]), torch.zeros(2, 3))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    """Or else a diverged rank would infect the others with plausible numbers."""
    back_ND = there_and_back(torch.tensor([[1.0, bad, 2.0], [1.0, 3.0, 2.0]]), FORMATS[name])
    assert not back_ND[0, 1].isfinite()
    assert torch.equal(back_ND[1], torch.tensor([1.0, 3.0, 2.0]))


def test_bf16_rows_are_not_touched_by_a_wire_of_bf16() -> None:
    x_ND = torch.randn(2, 3).bfloat16()
    assert encoded(x_ND, BF16_ROWS) is x_ND
    assert encoded(x_ND, None) is x_ND


def travelling(name: str | None) -> ExchangeOptions:
    """Options of a world whose rows travel in the format ``name``."""
    return ExchangeOptions(WIRES[name])


@dataclass(frozen=True)
class Trip:
    """Rows of experts that multiply by a power of two, and the gradients of the rows that were sent."""

    x_ND: Tensor
    y_ND: Tensor
    grad_ND: Tensor
    cotangent_ND: Tensor
    there: Traffic
    traffic: Traffic
    away: int
    arrived: int


def trip(world: World, dtype: torch.dtype, representable: bool = False) -> Trip:
    """Dispatch, experts and combine, forward and backward, with the rows of COUNTS."""
    counts, width = COUNTS[world.rank], 5
    generator = torch.Generator().manual_seed(world.rank)
    x_ND, cotangent_ND = (torch.randn(sum(counts), width, dtype=dtype, generator=generator) for _ in range(2))
    if representable:
        x_ND, cotangent_ND = (x.sign() * 2 for x in (x_ND, cotangent_ND))
    x_ND.requires_grad_()
    world.traffic.reset()
    plan = plan_dispatch(torch.tensor(counts), world)
    y_ND = combine(dispatch(x_ND, plan, world) * 2.0**world.rank, plan, world)
    there = replace(world.traffic)
    (grad_ND,) = torch.autograd.grad(y_ND, x_ND, cotangent_ND)
    away, arrived = (sum(rows) - rows[world.rank] for rows in (plan.send_rows, plan.receive_rows))
    return Trip(x_ND.detach(), y_ND.detach(), grad_ND, cotangent_ND, there, world.traffic, away, arrived)


@both_kinds
@pytest.mark.parametrize("wire", ERROR)
def test_results_and_gradients_are_off_by_two_roundings_at_most(run: Any, wire: str) -> None:
    for rank, done in enumerate(run(4, lambda world: trip(world, torch.float64), options=travelling(wire))):
        factor_N1 = 2.0 ** torch.arange(4).repeat_interleave(torch.tensor(COUNTS[rank])).unsqueeze(1)
        for actual, source, error in (
            (done.y_ND, done.x_ND, ERROR[wire]),
            (done.grad_ND, done.cotangent_ND, ERROR["bf16"]),
        ):
            exact_ND = source * factor_N1
            twice = (1 + error) ** 2 - 1
            assert ((actual - exact_ND).abs() <= twice * exact_ND.abs() + 1e-4).all()
            assert not len(exact_ND) or not torch.equal(actual, exact_ND)


@both_kinds
@pytest.mark.parametrize("wire", ERROR)
def test_representable_rows_arrive_to_the_bit(run: Any, wire: str) -> None:
    plain, rounded = (
        run(4, lambda world: trip(world, torch.float32, True), options=travelling(name)) for name in (None, wire)
    )
    for expected, actual in zip(plain, rounded, strict=True):
        assert torch.equal(actual.y_ND, expected.y_ND)
        assert torch.equal(actual.grad_ND, expected.grad_ND)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_those_that_really_travel(run: Any, dtype: torch.dtype) -> None:
    width, size = 5, dtype.itemsize
    for wire, forward_bytes, backward_bytes in (
        (None, size * width, size * width),
        ("bf16", 2 * width, 2 * width),
        ("fp8_e4m3", width + 1, 2 * width),
    ):
        for done in run(4, lambda world: trip(world, dtype), options=travelling(wire)):
            rows = done.away + done.arrived
            assert done.there == Traffic(rows, rows * forward_bytes)
            assert done.traffic == Traffic(2 * rows, rows * (forward_bytes + backward_bytes))


class RoundedAlone(SingleWorld):
    """One rank that rounds what it keeps, as several ranks do, by autograd's own cast."""

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return x_ND.to(torch.bfloat16).to(x_ND.dtype)


LOCAL = ("x", "out", "experts.")


def whole(of_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What each rank has a part of, put together; what all have, added."""
    return {
        name: torch.cat(parts, dim=int(name == "out")) if name.startswith(LOCAL) else torch.stack(parts).sum(0)
        for name in of_ranks[0]
        for parts in [[of_rank[name] for of_rank in of_ranks]]
    }


@pytest.mark.parametrize("name", ["comet", "top_k"])
def test_a_layer_rounds_exactly_where_rows_travel(name: Any) -> None:
    """As one rank whose rows are cast: rows that stay at home are rounded too, weights are not."""
    case = Case(gate=name, num_gates=2)
    shares, (one,) = shares_of(case, [3, 0, 5, 2]), shares_of(case, [10])
    alone, exact = (step(one, world)[0] for world in (RoundedAlone(), SingleWorld()))
    of_ranks = EmulatedWorld(4, options=travelling("bf16")).run(lambda world: step(shares[world.rank], world)[0])
    assert_all_same(whole(of_ranks), alone, 1e-12)
    assert (alone["out"] - exact["out"]).abs().max() > 1e-5


@pytest.mark.parametrize("wire", ERROR)
def test_two_levels_round_rows_and_sums_but_no_list(wire: str) -> None:
    shares = shares_of(Case(gate="top_k", num_gates=2, dim=4, hidden=4), [3, 0, 5, 2])

    def of_rank(world: ProcessWorld) -> tuple[dict[str, Tensor], Traffic]:
        world = in_nodes(world, 2)
        return step(shares[world.rank], world)[0], world.traffic

    plain, rounded = (run_worlds(4, of_rank, options=travelling(name)) for name in (None, wire))
    exact, actual = (whole([grads for grads, _ in of_ranks]) for of_ranks in (plain, rounded))
    for name, tensor in exact.items():
        error = (actual[name] - tensor).abs().max() / tensor.abs().max()
        assert 0 < error < 5 * ERROR[wire], name
    for (_, before), (_, after) in zip(plain, rounded, strict=True):
        assert after.rows == before.rows
        saved = before.bytes - after.bytes
        if wire == "bf16":
            assert saved == before.rows * 4 * (8 - 2)
        else:
            assert before.rows * 4 * (8 - 2) < saved < before.rows * (4 * 8 - 5)
