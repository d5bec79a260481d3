"""What the rows of a sweep file come to."""

from __future__ import annotations

from typing import Any

import pytest

from dist_moe.errors import UserError
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps.plan import Row, plan_sweep

from .conftest import LR, SWEEP, Write

ROWS = SWEEP["rows"]


def rows(write: Write, **changes: Any) -> dict[str, Row]:
    return {row.name: row for row in plan_sweep(write(**changes)).rows}


def config(write: Write, row: Row, index: int = 0) -> SupervisedConfig:
    return row.config(write().parent / "base.yaml", row.values(row.draw(0, index)))


def test_a_draw_depends_on_seed_row_and_index_and_on_nothing_else(write: Write) -> None:
    comet, top_k = rows(write).values()
    draw = comet.draw(3, 7)
    assert comet.draw(3, 7) == draw
    others = [comet.draw(4, 7), comet.draw(3, 8), top_k.draw(3, 7)]
    assert all(other[LR] != draw[LR] for other in others)
    reordered = {"COMET": ROWS["COMET"]}
    assert rows(write, rows=reordered, trials=9)["COMET"].draw(3, 7) == draw


def test_common_draws_depend_on_the_field_in_place_of_the_row(write: Write) -> None:
    """So what rows share is drawn alike, and what a row draws alone changes none of it."""
    comet, top_k = rows(write, draws="common", trials=6, seeds=2).values()
    drawn, other = comet.draw(3, 7), top_k.draw(3, 7)
    assert {name: drawn[name] for name in other} == other
    assert drawn.keys() - other.keys() == {"model.gate.gamma"}
    assert comet.draw(3, 6) == drawn != comet.draw(3, 8)
    assert [top_k.values(other, index)["seed"] for index in (6, 7)] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 2}, "trials=3 is no multiple of seeds=2"),
        ({"sampler": "tpe", "draws": "common"}, "sampler=tpe draws by what its own row has found"),
        ({"seeds": 3, "set": {"seed": 1}}, "sets or draws seed, and seeds=3 does"),
    ],
)
def test_seeds_and_draws_that_do_not_go_together(write: Write, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows(write, **changes)


def test_a_trial_has_the_fields_set_and_drawn(write: Write) -> None:
    row = rows(write, set={"train.epochs": 7})["COMET"]
    drawn = row.draw(0, 0)
    made = config(write, row)
    assert made.train.epochs == 7
    assert made.model.gate.model_dump()["gamma"] == drawn["model.gate.gamma"]
    assert made.model.experts.dropout == drawn["model.experts.dropout"]
    assert made.deepspeed["optimizer"] == {"type": "AdamW", "params": {"lr": drawn[LR]}}


def test_a_row_overrules_the_sweep(write: Write) -> None:
    """Its set beats the shared set and the shared space, its space beats the shared set."""
    row = rows(
        write,
        set={"train.epochs": 7, "seed": 1, "train.batch_size": 64},
        rows={
            "A": {
                "set": {"model.experts.dropout": 0.125, "seed": 2},
                "space": {"train.epochs": {"int_uniform": [1, 3]}},
            }
        },
    )["A"]
    made = config(write, row)
    assert (made.seed, made.model.experts.dropout, made.train.batch_size) == (2, 0.125, 64)
    assert made.train.epochs in (1, 2, 3)
    assert "model.experts.dropout" not in row.space


def test_trials_do_not_share_what_a_row_sets(write: Write) -> None:
    row = rows(write)["COMET"]
    gammas = {config(write, row, index).model.gate.model_dump()["gamma"] for index in range(10)}
    assert gammas == {0.1, 1}
    assert dict(row.assignments)["model.gate"] == {"name": "comet", "k": 2}


def test_a_gate_may_be_named_as_on_the_command_line(write: Write) -> None:
    """Fields of the base's gate that the new one does not have are dropped."""
    base = {"model": {"gate": {"name": "comet", "k": 3, "gamma": 0.5}}}
    made = rows(
        write, base=base, space={"seed": {"int_uniform": [0, 9]}}, rows={"A": {"set": {"model.gate.name": "top_k"}}}
    )
    gate = made["A"].config(write(base=base).parent / "base.yaml", {"seed": 1}).model.gate
    assert (gate.name, gate.k) == ("top_k", 3)


def test_a_whole_section_may_be_drawn(write: Write) -> None:
    gates = [{"name": "top_k", "k": 1}, {"name": "comet", "k": 2, "gamma": 0.25}]
    row = rows(write, rows={"A": {"space": {"model.gate": {"choice": gates}}}})["A"]
    made = {config(write, row, index).model.gate.name for index in range(10)}
    assert made == {"top_k", "comet"}


def test_too_many_corners_are_not_all_tried_but_every_value_is(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(range(1, 40))
    space = {"seed": {"choice": values}, "train.epochs": {"choice": values}, LR: {"log_uniform": [1e-4, 1e-2]}}
    seen: list[dict[str, Any]] = []
    valid = config(write, rows(write)["COMET"])
    monkeypatch.setattr(Row, "config", lambda self, base, values: seen.append(values) or valid)
    rows(write, space=space, rows={"A": {}})
    assert len(seen) < 256
    for name, wanted in (("seed", values), ("train.epochs", values), (LR, [1e-4, 1e-2])):
        assert {one[name] for one in seen} == set(wanted)
    seen.clear()
    rows(write, rows={"A": {}})
    assert len(seen) == 4
