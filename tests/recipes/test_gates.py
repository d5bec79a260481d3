"""Every registered gate, and every way to permute its slots, trains; and the layout does not change the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.gates import GATES
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, stage_overrides, train_all, write_config

STEPS = 6
EACH_GATE: dict[str, dict[str, Any]] = {
    "ada_moe": {"name": "ada_moe", "k": 3, "null_slots": 4, "balance_weight": 0.1},
    "comet": {"name": "comet", "k": 2, "gamma": 0.1, "balance_weight": 0.01, "max_active": 3},
    "comet-lazy": {"name": "comet", "k": 2, "gamma": 0.1, "lazy": True},
    "dselect_k": {"name": "dselect_k", "k": 2},
    "hash": {"name": "hash"},
    "hash-balanced": {"name": "hash", "assignment": "balanced"},
    "relu": {"name": "relu", "k": 2, "l1_weight": 0.1},
    "smoe_dropout": {"name": "smoe_dropout", "k_min": 1, "k_max": 4},
    "softmax": {"name": "softmax"},
    "top_k": {"name": "top_k", "k": 2, "balance_weight": 0.1, "z_loss_weight": 0.01},
    "top_k-bias": {"name": "top_k", "k": 1, "scores": "sigmoid", "bias_update_rate": 0.01},
}
AUX = {
    "ada_moe": ["null_balance"],
    "comet": ["entropy", "split_balance"],
    "relu": ["l1"],
    "top_k": ["load_balance", "z_loss"],
}
COMET = {"name": "comet", "k": 2, "gamma": 0.3, "entropy_weight": 0.05}
PERMUTATIONS: dict[str, dict[str, Any]] = {
    "per_gate": {"per_gate": True},
    "per_branch": {"per_branch": True},
    "per_gate_and_branch": {"per_gate": True, "per_branch": True},
    "relaxed": {"rounding": "relaxed"},
    "hard": {"forward": "hard"},
    "hard_top_k": {"forward": "hard", "per_gate": True},
    "hard_per_gate_and_branch": {"forward": "hard", "per_gate": True, "per_branch": True},
}
SLOTS = {"many_to_one": ("top_k", 9), "fewer_slots": ("comet", 3)}
CASES = [*EACH_GATE, *PERMUTATIONS, *SLOTS]


def overrides(case: str) -> list[str]:
    if case in EACH_GATE:
        return [f"model.gate={EACH_GATE[case]}"]
    if case in SLOTS:
        gate_name, slots = SLOTS[case]
        return [f"model.gate={EACH_GATE[gate_name]}", f"model.num_slots={slots}"]
    gate = EACH_GATE["top_k"] if case == "hard_top_k" else COMET
    return [f"model.gate={gate}", f"model.permutation={PERMUTATIONS[case] | {'epochs': 4 / 90}}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("gates")
    config = write_config(root, tiny_data, train={"max_steps": STEPS})
    for world in (1, 2):
        layout = [f"parallel.expert_parallel_size={world}"]
        on_ranks(world, train_all, config, {str(root / f"{case}-{world}"): overrides(case) + layout for case in CASES})
    sharded = ["parallel.expert_parallel_size=2", *stage_overrides(3)]
    on_ranks(2, train_all, config, {str(root / f"{case}-sharded"): overrides(case) + sharded for case in CASES})
    return root


def test_every_registered_gate_is_tried() -> None:
    ours = {name for name, settings in GATES.by_name.items() if settings.__module__.startswith("dist_moe.")}
    assert {gate["name"] for gate in EACH_GATE.values()} == ours


@pytest.mark.parametrize("ranks", ["2", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(runs: Path, case: str, ranks: str) -> None:
    one, two = runs / f"{case}-1", runs / f"{case}-{ranks}"
    assert len(losses_of(one)) == STEPS
    assert losses_of(one)[-1] < losses_of(one)[0]
    torch.testing.assert_close(losses_of(two), losses_of(one), rtol=0, atol=1e-5)
    for ours, theirs in zip(records_of(two), records_of(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["load"] == theirs["load"]
        assert ours["total_loss"] == pytest.approx(theirs["total_loss"], abs=1e-5)
        for name in AUX.get(case, []):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
            assert ours[name] != 0


def test_the_schedule_of_smoe_dropout_runs_over_the_whole_run(runs: Path) -> None:
    """round(1 + 3 t/6) experts per token in step t = 0..5; halves go to the even number."""
    assert [record["active_experts"] for record in records_of(runs / "smoe_dropout-1")] == [1, 1, 2, 3, 3, 3]


def test_null_slots_and_capped_trees_spend_less(runs: Path) -> None:
    assert 0 < records_of(runs / "ada_moe-1")[-1]["active_experts"] < 3
    assert records_of(runs / "comet-1")[0]["active_experts"] <= 3


def test_a_hard_forward_pass_keeps_the_routing_sparse(runs: Path) -> None:
    """In the stage too, where a soft one makes every token visit every expert."""
    assert [record["active_experts"] for record in records_of(runs / "relaxed-1")][:3] == [4.0] * 3
    assert [record["active_experts"] for record in records_of(runs / "hard_top_k-1")] == [2.0] * STEPS
