"""The model of a step's time keeps to what must hold on any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_moe.errors import UserError
from dist_moe.planning.scale.machine import BUILTIN
from dist_moe.planning.scale.spread import (
    Layout,
    distinct_parts,
    expected_spread,
    missed,
    missed_by_draws,
)
from dist_moe.planning.scale.step_time import EXCHANGES, exchange_bytes, node_skew, predict, row_skew
from dist_moe.planning.scale.work import Work
from tests.planning.scale.machines import PLAIN, with_links

WORK = Work(
    dim=64,
    out_dim=32,
    experts=16,
    gates=2,
    k=2,
    expert_flops=2.0 * 64 * 32,
    expert_elements=5.0 * 32,
    dense_flops=2.0 * 64 * 16,
    dense_elements=500.0,
    slots=32,
    expert_parameters=16 * 64 * 32,
    dense_parameters=20_000,
)
TOKENS = 1000.0
LAYOUTS = [Layout(1, 1, 1), Layout(1, 4, 4), Layout(1, 8, 2), Layout(2, 2, 4), Layout(4, 8, 16), Layout(64, 8, 16)]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.nodes_of_group == 1])
def test_within_a_node_the_two_exchanges_are_one(layout: Layout) -> None:
    flat, two_level = (predict(PLAIN, WORK, layout, TOKENS, name) for name in EXCHANGES)
    assert replace(two_level, exchange="flat") == flat


@pytest.mark.parametrize("name", EXCHANGES)
def test_twice_the_bandwidth_halves_the_wire(name: str) -> None:
    layout = Layout(2, 4, 8)
    slow, fast = (
        predict(
            with_links(latency_s=0.0, all_to_all_bytes_per_s=rate, all_reduce_bytes_per_s=rate),
            WORK,
            layout,
            TOKENS,
            name,
        )
        for rate in (1e9, 2e9)
    )
    assert slow.seconds.wire > 0
    assert fast.seconds.wire == pytest.approx(slow.seconds.wire / 2)
    assert fast.seconds.gradients == pytest.approx(slow.seconds.gradients / 2)
    assert replace(fast.seconds, wire=0, gradients=0) == replace(slow.seconds, wire=0, gradients=0)


def test_latency_adds_to_the_wire_what_five_collectives_wait() -> None:
    layout = Layout(2, 4, 8)
    none, some = (predict(with_links(latency_s=s), WORK, layout, TOKENS).seconds.wire for s in (0.0, 1e-3))
    assert some - none == pytest.approx(5 * 7 * 1e-3)


def test_with_one_expert_per_token_two_levels_send_as_many_rows_across_nodes() -> None:
    work, layout = replace(WORK, k=1, gates=1), Layout(4, 1, 4)
    spread = expected_spread(16, 1, 1, TOKENS, layout)
    flat, two_level = (exchange_bytes(work, spread, name) for name in EXCHANGES)
    assert flat.between == pytest.approx(two_level.rows)
    assert two_level.lists == pytest.approx(spread.pairs.across * (8 + 2 * 4))
    assert flat.between == pytest.approx(TOKENS * 3 / 4 * 2 * (64 + 32) * 4)


def test_with_many_experts_per_token_two_levels_send_less_across_nodes() -> None:
    spread = expected_spread(16, 8, 1, TOKENS, Layout(2, 2, 4))
    flat, two_level = (exchange_bytes(replace(WORK, k=8, gates=1), spread, name) for name in EXCHANGES)
    assert two_level.between < 0.3 * flat.between


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", EXCHANGES)
def test_efficiency_is_a_share(layout: Layout, name: str) -> None:
    for tokens in (1.0, TOKENS, 1e6):
        for skew in (1.0, float(layout.group)):
            predicted = predict(PLAIN, WORK, layout, tokens, name, skew=skew)
            assert 0 < predicted.efficiency <= 1
            assert all(seconds >= 0 for seconds in vars(predicted.seconds).values())


def test_skew_costs_time_and_efficiency() -> None:
    even, uneven = (predict(PLAIN, WORK, Layout(2, 4, 8), TOKENS, skew=skew) for skew in (1.0, 2.0))
    assert uneven.seconds.experts > 1.5 * even.seconds.experts
    assert uneven.seconds.wire > even.seconds.wire
    assert uneven.efficiency < even.efficiency


def test_rows_are_less_skewed_than_pairs_where_tokens_are_sent_once() -> None:
    many = replace(WORK, k=8)
    assert 1 < row_skew(many, 4, 1.5) < row_skew(replace(WORK, k=1, gates=1), 4, 1.5) == pytest.approx(1.5)
    assert row_skew(many, 4, 1.0) == 1
    assert missed_by_draws(16, 4, 3, 1.0) == pytest.approx(missed(16, 4, 3))
    assert node_skew(Layout(2, 4, 8), 1.4) == pytest.approx(1.2)
    assert node_skew(Layout(2, 4, 8), 8.0) == 2  # all to one of two nodes


def test_ranks_that_share_a_processor_take_turns() -> None:
    alone, shared = (
        predict(PLAIN.model_copy(update={"processors_per_node": cores}), WORK, Layout(1, 4, 4), TOKENS)
        for cores in (4, 2)
    )
    assert shared.seconds.total == pytest.approx(2 * alone.seconds.total)
    assert shared.efficiency == pytest.approx(alone.efficiency)


def test_a_link_between_nodes_is_shared_by_their_ranks() -> None:
    one, eight = (predict(with_links(latency_s=0.0), WORK, Layout(2, n, 2 * n), TOKENS).seconds for n in (1, 8))
    assert eight.wire == pytest.approx(8 * one.wire)


def test_gradients_by_stage() -> None:
    """An all-reduce sends 2 (s - 1) / s of what it reduces; ZeRO gathers parameters besides."""
    layout = Layout(1, 4, 1)
    everything = 4 * (WORK.dense_parameters + WORK.expert_parameters) * 3 / 4
    for stage, times in ((0, 2), (1, 3), (2, 3), (3, 3)):
        assert predict(PLAIN, replace(WORK, stage=stage), layout, TOKENS).gradient_bytes == times * everything
    split = predict(PLAIN, WORK, Layout(1, 4, 4), TOKENS)
    assert split.gradient_bytes == 3 * 4 * WORK.dense_parameters * 3 / 4  # experts have no copies


def test_rates_between_and_beyond_what_was_measured() -> None:
    assert PLAIN.flop_per_s(10) == pytest.approx(1e10)  # from the weight that a product waits for
    assert PLAIN.flop_per_s(1e6) == 1e11
    assert PLAIN.flop_per_s(0.5) == pytest.approx(5e8)


def test_expectations_of_uniform_choices() -> None:
    assert distinct_parts(16, 2, 2) == pytest.approx(2 * (1 - (8 * 7) / (16 * 15)))
    assert distinct_parts(2**14, 4, 3) == pytest.approx(4 * (1 - (3 / 4) ** 3), rel=1e-3)
    assert distinct_parts(16, 4, 16) == 4
    assert distinct_parts(16, 16, 3) == pytest.approx(3)
    assert distinct_parts(16, 16, 4, 2) == pytest.approx(16 * (1 - (12 / 16) ** 2))


def test_compute_against_communication_is_the_known_bound() -> None:
    """For SwiGLU experts of hidden width f: 4.5 f B / (b F) W / (W - 1), whatever the width and the experts."""
    hidden, width, machine = 2048, 4096, BUILTIN["h100"]
    free = machine.model_copy(update={"inside": machine.inside.model_copy(update={"latency_s": 0.0})})  # type: ignore[union-attr]
    work = replace(WORK, dim=width, out_dim=width, gates=1, expert_flops=6.0 * width * hidden, value_bytes=2)
    predicted = predict(free, replace(work, expert_elements=0), Layout(1, 8, 8), 1e6, training=False)
    assert predicted.seconds.experts / predicted.seconds.wire == pytest.approx(
        4.5 * hidden * 450e9 / (2 * 989e12) * 8 / 7, rel=1e-6
    )


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: Layout(2, 3, 4), ["parallel.expert_parallel_size=4", "2 x 3", "choose one of 1, 2, 3, 6"]),
        (lambda: Layout(2, 6, 4), ["parallel.expert_parallel_size=4", "--gpus=6", "choose"]),
        (lambda: Layout(0, 1, 1), ["nodes=0"]),
        (lambda: predict(PLAIN, WORK, Layout(4, 8, 32), TOKENS), ["=32", "model.num_experts=16", "choose"]),
        (lambda: predict(PLAIN, WORK, Layout(1, 2, 2), TOKENS, skew=3), ["--skew=3", "1..2"]),
        (
            lambda: predict(PLAIN.model_copy(update={"between": None}), WORK, Layout(2, 1, 2), TOKENS),
            ["'plain'", "'between'", "--measure"],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(mistake: object, words: list[str]) -> None:
    assert callable(mistake)
    with pytest.raises(UserError) as caught:
        mistake()
    for word in words:
        assert word in str(caught.value)
