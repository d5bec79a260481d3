"""A trained gate evaluated at another number of experts per token, and what is not a matter of evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.errors import UserError
from dist_moe.gates import GATES, GateContext
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.runs import for_evaluation
from tests.helpers.commands import succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import train_all, write_config

EXPERTS = 4
EVALUATED: dict[str, dict[str, Any]] = {
    "smoe_dropout": {"name": "smoe_dropout", "k_min": 2, "k_max": 3},
    "top_k": {"name": "top_k", "k": 2},
    "ada_moe": {"name": "ada_moe", "k": 3, "null_slots": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("options")
    config = write_config(root, tiny_data, train={"max_steps": 6})
    on_ranks(1, train_all, config, {str(root / name): [f"model.gate={gate}"] for name, gate in EVALUATED.items()})
    return root


def evaluated(run: Path, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(succeed(ranks, "evaluate", run, *overrides, "--json")[0].out)["test"]
    return metrics


def test_a_gate_with_a_schedule_is_evaluated_at_any_k(runs: Path) -> None:
    """Self-slimmable: the same weights, as many experts as there is time for; all of them too."""
    run, losses = runs / "smoe_dropout", {}
    for k in (1, 2, EXPERTS):
        metrics = evaluated(run, f"model.gate.evaluation_k={k}")
        assert metrics["active_experts"] == k
        losses[k] = metrics["loss"]
    trained = evaluated(run)
    assert trained["active_experts"] == 3
    assert len({*losses.values(), trained["loss"]}) == 4
    assert evaluated(run, "model.gate.evaluation_k=3")["loss"] == trained["loss"]


def test_on_two_ranks_the_same(runs: Path) -> None:
    one, two = (evaluated(runs / "smoe_dropout", "model.gate.evaluation_k=1", ranks=ranks) for ranks in (1, 2))
    assert two["active_experts"] == 1
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)


def test_top_k_too_and_null_slots_spend_more_with_a_larger_k(runs: Path) -> None:
    assert evaluated(runs / "top_k", "model.gate.k=4")["active_experts"] == 4
    spent = [evaluated(runs / "ada_moe", f"model.gate.k={k}")["active_experts"] for k in (1, 3, 6)]
    assert spent[0] < spent[1] < spent[2] == EXPERTS


def config_of(gate: dict[str, Any]) -> SupervisedConfig:
    return SupervisedConfig.model_validate(
        {"data": {"name": "movielens-1m"}, "model": {"name": "recommender", "gate": gate}}
    )


@pytest.mark.parametrize(
    ("gate", "override", "parts"),
    [
        ("top_k", "model.gate.scores=sigmoid", ("model.gate.scores=sigmoid", "allowed: model.gate.k")),
        ("top_k", "train.batch_size=3", ("train.batch_size=3", "allowed: model.gate.k")),
        ("top_k", "k=3", ("k=3", "allowed: model.gate.k")),
        ("smoe_dropout", "model.gate.k_max=3", ("model.gate.k_max=3", "allowed: model.gate.evaluation_k")),
        ("hash", "model.gate.k=3", ("allowed: none of this gate",)),
        ("top_k", "model.gate.k=17", ("model.gate.k=17 exceeds num_experts=16",)),
        ("top_k", "model.gate.k=0", ("model.gate.k=0", "greater than or equal to 1")),
    ],
)
def test_what_the_weights_belong_to_is_refused_with_what_is_allowed(
    gate: str, override: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        for_evaluation(config_of({"name": gate}), [override])
    for part in parts:
        assert part in str(refused.value)


def test_no_tensor_depends_on_what_may_be_changed() -> None:
    """Options that a gate offers exist, and leave its tensors as they are."""
    changed = {"k": 1, "evaluation_k": 1, "max_active": 1, "hard_evaluation": True, "lazy": True}
    offered = {name: settings.evaluation_fields for name, settings in GATES.by_name.items()}
    assert offered["comet"] == ("max_active", "hard_evaluation", "lazy")
    for name, fields in offered.items():
        for field in fields:
            settings = GATES.by_name[name]()
            other = settings.model_copy(update={field: changed[field]})
            tensors = [_tensors(gate) for gate in (settings, other)]
            assert tensors[0] == tensors[1], (name, field)


def _tensors(settings: Any) -> dict[str, tuple[int, ...]]:
    gate = settings.build(3, 4, GateContext(total_steps=10))
    return {key: tuple(tensor.shape) for key, tensor in gate.state_dict().items()}
