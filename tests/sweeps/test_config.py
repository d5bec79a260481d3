"""A wrong sweep file is refused before anything starts, by row and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.models import RunShape, TableFeatures
from dist_moe.parallel import SingleWorld
from dist_moe.sweeps.config import RowConfig, SweepConfig, load_sweep
from dist_moe.sweeps.distributions import KINDS
from dist_moe.sweeps.plan import plan_sweep

from .conftest import LR, SWEEP, Write

ROWS = SWEEP["rows"]


def row(**content: Any) -> dict[str, Any]:
    return {"rows": {"COMET": ROWS["COMET"] | content}}


def drawn(**distribution: Any) -> dict[str, Any]:
    return row(space={"model.gate.gamma": distribution})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (drawn(uniform=[2, 1]), ["row 'COMET', space, model.gate.gamma", "2.0 must be below the highest, 1.0"]),
        (drawn(uniform=[1, 1]), ["row 'COMET', space, model.gate.gamma", "for one value use set"]),
        (drawn(log_uniform=[0, 1]), ["row 'COMET', space, model.gate.gamma", "0.0 must be positive"]),
        (drawn(uniform=[1]), ["row 'COMET', space, model.gate.gamma"]),
        (drawn(uniform=["low", 1]), ["row 'COMET', space, model.gate.gamma", "'low'", "number"]),
        (drawn(int_uniform=[1.5, 2]), ["row 'COMET', space, model.gate.gamma", "1.5", "integer"]),
        (drawn(int_log_uniform=[0, 2]), ["row 'COMET', space, model.gate.gamma", "0 must be positive"]),
        (drawn(choice=[]), ["row 'COMET', space, model.gate.gamma", "at least 1 item"]),
        (drawn(choice=[1, 2, 1]), ["row 'COMET', space, model.gate.gamma", "1 is listed twice"]),
        (drawn(choice=[1, True]), ["row 'COMET', space, model.gate.gamma", "True is listed twice"]),
        (drawn(gauss=[0, 1]), ["row 'COMET', space, model.gate.gamma", "gauss", "log_uniform, int_uniform"]),
        ({"space": {LR: {"uniform": [2, 1]}}}, [f"space, {LR}", "must be below"]),
        (row(spaces={}), ["row 'COMET', spaces", "no such field", "did you mean space?"]),
        ({"trials": 0}, ["trials=0", "greater than or equal to 1"]),
        ({"rows": {}}, ["rows={}", "at least 1"]),
        ({"sampler": "grid"}, ["sampler='grid'", "'random' or 'tpe'"]),
        ({"pruner": "hyperband"}, ["pruner='hyperband'", "'median'"]),
        ({"best_fraction": 0}, ["best_fraction=0", "greater than 0"]),
        ({"trials_together": 0}, ["trials_together=0"]),
        ({"workers": 3}, ["workers=3", "no such field"]),
        ({"config": "absent.yaml"}, ["absent.yaml cannot be read", "No such file"]),
        ({"space": {}, "rows": {"A": {}}}, ["row 'A' draws nothing", "give it a space"]),
        (
            {"space": {}, "rows": {"A": {}}, "trials": 6, "seeds": 3},
            ["row 'A' draws nothing", "give it a space, or trials=3, one for each seed"],
        ),
        ({"set": {LR: 1.0}}, [f"the sweep both sets and draws {LR}", "leave one out"]),
        (row(set={"model.gate.gamma": 1.0}), ["row 'COMET' both sets and draws model.gate.gamma"]),
        (
            row(space={"model.gate": {"choice": [{"name": "top_k"}]}}, set={"model.gate.k": 1}),
            ["row 'COMET': drawing model.gate as a whole overwrites model.gate.k"],
        ),
        (row(space={"model.gate.gama": {"choice": [1]}}), ["row 'COMET' cannot be trained", "did you mean"]),
        (drawn(uniform=[0, 1]), ["row 'COMET' cannot be trained", "model.gate.gamma=0.0", "greater than 0"]),
        (drawn(choice=[1, 5, -1]), ["row 'COMET' cannot be trained", "model.gate.gamma=-1", "greater than 0"]),
        (row(space={"model.gate.k": {"int_uniform": [1, 99]}}), ["row 'COMET' cannot be trained", "model.gate.k=99"]),
    ],
)
def test_what_is_wrong_is_named(write: Write, changes: dict[str, Any], parts: list[str]) -> None:
    path = write(**changes)
    with pytest.raises(UserError) as refusal:
        plan_sweep(path)
    for part in parts:
        assert part in str(refusal.value)


def test_numbers_may_be_written_with_exponents(write: Write) -> None:
    path = write()
    text = path.read_text().replace("log_uniform:\n    - 0.0001\n    - 0.01", "log_uniform: [1e-4, 1E-2]")
    assert "1e-4" in text
    path.write_text(text.replace("- 0.1\n", "- 1e-1\n"))
    sweep = load_sweep(path)
    assert sweep.space[LR].model_dump() == {"log_uniform": (1e-4, 1e-2)}
    assert sweep.rows["COMET"].space["model.gate.gamma"].model_dump() == {"choice": [0.1, 1]}


def test_the_base_configuration_is_relative_to_the_sweep_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.chdir(path.parent.parent)
    assert load_sweep(Path(path.parent.name) / path.name).config.resolve() == path.parent / "base.yaml"


def test_every_field_is_described() -> None:
    for model in (SweepConfig, RowConfig, *KINDS.values()):
        assert all(field.description for field in model.model_fields.values())


SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))
(CENSUS,) = (path for path in SWEEPS if path.stem == "multi_task_census")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_it_have_the_papers_rows(path: Path) -> None:
    rows = [row.name for row in plan_sweep(path).rows]
    if path.stem == "multi_task_census":
        assert rows[:5] == ["MMoE", "shared-bottom", "PLE", "HoME", "MMoE with COMET"]
        assert all(row.startswith("HoME - ") for row in rows[5:])
    elif path.stem.startswith("comet_plus"):  # searches, then their controls
        searches = [row for row in rows if row.startswith("COMET+ (")]
        assert rows[: len(searches) + 1] == ["COMET", *searches]
        assert searches[0] == "COMET+ (assignment)"
    elif path.stem == "plus_of_other_gates":
        assert rows == [f"{gate}{what}" for gate in ("Top-k", "Hash") for what in ("", "+", ", random permutation")]
    else:
        of_gates = [f"{gate}{plus}" for gate in ("Hash", "Top-k", "DSelect-k") for plus in ("", "+")]
        small = path.stem.startswith("small_")
        assert rows == [*of_gates, "COMET", "COMET+ (Sinkhorn)", f"COMET+ ({'assignment' if small else 'swap'})"]


@pytest.mark.parametrize("row", ["shared-bottom", "PLE", "HoME", "HoME - feature gate", "HoME - mask", "HoME - BN"])
def test_rows_of_the_census_have_as_many_parameters_as_the_first(row: str) -> None:
    rows = {row.name: row for row in plan_sweep(CENSUS).rows}
    first, other = (parameters(rows[name].config(load_sweep(CENSUS).config, {}).model) for name in ("MMoE", row))
    assert other == pytest.approx(first, rel=0.02)


def parameters(model: Any) -> int:
    """The parameters of a model of Census-Income's columns."""
    features = TableFeatures(sizes=(519 // 32,) * 31 + (519 - 31 * (519 // 32),), numeric=7)  # 519 ids in 32 columns
    with torch.device("meta"):
        built = model.build(features, ("income", "never_married"), RunShape(SingleWorld(), 1))
    return sum(parameter.numel() for parameter in built.parameters())


def test_a_training_configuration_is_no_sweep() -> None:
    with pytest.raises(UserError) as raised:
        plan_sweep(Path(__file__).parents[2] / "configs" / "movielens_small.yaml")
    assert "rows: required, but not given" in str(raised.value)
    assert max(map(len, str(raised.value).splitlines())) < 250
