"""The listing of all fields: nothing is missing, ranges are those that validation enforces."""

from __future__ import annotations

from typing import Any

import pytest

from dist_moe.cli.main import main
from dist_moe.config.listing import field_listing, fields_of
from dist_moe.errors import UserError
from dist_moe.gates import GATES
from dist_moe.recipes.recipe import load_config
from dist_moe.recipes.supervised.config import SupervisedConfig

VALUE = "text | bool | int | float"


def test_the_fields_of_every_kind_of_section_are_there() -> None:
    names = {(field.name, field.owner) for field in fields_of(SupervisedConfig)}
    for gate, settings in GATES.by_name.items():
        assert {(f"model.gate.{name}", gate) for name in settings.model_fields} <= names
    assert ("data.negatives", "movielens-1m") in names
    assert ("model.experts.channels", "conv") in names
    assert ("swap_search.every_epochs", None) in names


@pytest.mark.parametrize(
    ("prefix", "line"),
    [
        ("seed", "seed: int >= 0, default 0"),
        ("model.experts.dropout", "model.experts.dropout: 0 <= float < 1, default 0.5  [dense_relu]"),
        ("model.gate.max_active", "model.gate.max_active: int >= 1 | null, default null  [comet]"),
        ("model.gate.gamma", "model.gate.gamma: float > 0, default 1.0  [comet]"),
        ("data.negatives", "data.negatives: uniform | per_user, default uniform  [movielens-1m]"),
        ("target_weights", "target_weights: [float, ...], default []"),
        ("train.patience", "train.patience: int >= 1 | null, default null"),
        ("data.columns", "data.columns: {NAME: section}, default required  [table]"),
        ("data.columns.NAME.type", "data.columns.NAME.type: categorical | numeric | list"),
        ("data.columns.NAME.min_count", "data.columns.NAME.min_count: int >= 1, default 2  [categorical, list]"),
        ("data.targets.NAME.positive", f"data.targets.NAME.positive: [{VALUE}, ...] | null, default null  [binary]"),
        (
            "data.split.values",
            f"data.split.values: {{train | val | test: [{VALUE}, ...]}}, "
            "default {train: [train], val: [val], test: [test]}  [table]",
        ),
    ],
)
def test_a_line(prefix: str, line: str) -> None:
    assert field_listing([SupervisedConfig], prefix).splitlines()[0] == line


def test_fields_that_several_kinds_share_are_listed_once() -> None:
    listing = field_listing([SupervisedConfig])
    assert listing.count("train.batch_size:") == 1
    shared = "[movielens-1m, multi-fashion-mnist, text, sms-spam, squad-v2, table, census-income, kuairand, "
    shared += "movielens-1m-table, cora, graph]"
    assert f"data.cache: path | null, default null  {shared}" in listing
    (gates,) = (line for line in listing.splitlines() if line.startswith("model.gate.name:"))
    assert gates.removeprefix("model.gate.name: ").split(" | ") == list(GATES.by_name)


def test_what_the_listing_calls_out_of_range_is_refused(tmp_path: Any) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    assert "model.experts.dropout: 0 <= float < 1," in field_listing([SupervisedConfig], "model.experts.dropout")
    load_config(tmp_path / "empty.yaml", ["model.experts.dropout=0"])
    with pytest.raises(UserError, match=r"model\.experts\.dropout=1"):
        load_config(tmp_path / "empty.yaml", ["model.experts.dropout=1"])


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--fields", "swap_search.max"]) == 0
    assert "swap_search.max_swaps: int >= 0, default 200\n    swaps taken at most\n" in capsys.readouterr().out
    assert main(["config", "--fields", "trian"]) == 2
    assert "--fields trian: no field begins so; did you mean train" in capsys.readouterr().err


def test_null_takes_a_section_of_deepspeed_away(tmp_path: Any) -> None:
    (tmp_path / "some.yaml").write_text("deepspeed: {optimizer: {type: SGD}, scheduler: {type: WarmupLR}}\n")
    config = load_config(tmp_path / "some.yaml", ["deepspeed.scheduler=null"])
    assert config.deepspeed == {"optimizer": {"type": "SGD"}}
