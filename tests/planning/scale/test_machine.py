"""A machine's constants: as a file, as a measurement, and wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import UserError
from dist_moe.planning.scale.machine import BUILTIN, Machine, read_machine
from dist_moe.planning.scale.measure import measure_machine
from tests.helpers.pool import on_ranks
from tests.planning.scale.machines import PLAIN


def test_what_is_written_is_read(tmp_path: Path) -> None:
    PLAIN.write(tmp_path / "plain.yaml")
    assert read_machine(str(tmp_path / "plain.yaml")) == PLAIN


def test_data_sheets_say_that_they_are_data_sheets() -> None:
    for name, machine in BUILTIN.items():
        assert read_machine(name) == machine
        assert "not measured" in machine.source
    assert BUILTIN["h100"].flop_per_s(1e4) == 989e12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processors_per_node": 0}, ["processors_per_node=0", "greater than 0"]),
        ({"inside": {"latency_s": 1e-5}}, ["inside.all_to_all_bytes_per_s: required", "--measure"]),
        ({"gemm_flop_per_s_by_rows": {}}, ["gemm_flop_per_s_by_rows={}", "at least one rate"]),
        ({"speed": 3}, ["speed=3"]),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(PLAIN.model_dump(mode="json") | change))
    with pytest.raises(UserError) as caught:
        read_machine(str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_an_unknown_machine_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--machine=h1000.*h100, h200, a100"):
        read_machine("h1000")


def measured(processors: float) -> Machine:
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        return measure_machine(groups, processors)


def test_two_ranks_measure_one_machine() -> None:
    one, other = on_ranks(2, measured, 2.0)
    assert one == other
    rates = list(one.gemm_flop_per_s_by_rows.values())
    assert rates[-1] > rates[0] > 1e6
    assert 1e6 < one.elementwise_bytes_per_s < 1e13
    assert one.inside is not None
    assert 1e-7 < one.inside.latency_s < 1
    assert one.inside.all_to_all_bytes_per_s > 1e5
    assert one.between is None


def test_a_rank_alone_has_no_links_and_a_step_costs_something() -> None:
    """On several ranks that cost is what remains without the links' latency, which on a busy machine is nothing."""
    (alone,) = on_ranks(1, measured, 2.0)
    assert alone.inside is None
    assert alone.between is None
    assert min(alone.step_fixed_s, alone.layer_fixed_s) > 0
