"""Searches while the gates harden: when the window is open, on how many ranks, and for which gates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config.files import json_line, parse_json
from dist_moe.errors import UserError
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, Gate, TopK
from dist_moe.layer import MoE
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.entropy_window import EntropyWindow
from dist_moe.recipes.merge_compress.recover import check_recovery
from dist_moe.recipes.merge_compress.settings import RecoverConfig
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.search import SlotTable
from dist_moe.tasks import build_model
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import succeed
from tests.helpers.runs import largest_difference, records_of, tensors_of, write_config

K, EXPERTS, GATES, WEIGHT = 2, 8, 2, 0.05
LARGEST = GATES * WEIGHT * K * math.log(EXPERTS)
LOG, EVERY, HIGH, LOW = 3, 2, 0.97, 0.5
SEARCH = (
    f"assignment_search={{while_entropy: [{HIGH}, {LOW}], every_steps: {EVERY}, until_step: 1, examples: 300, "
    "verified_on: 200, batch_size: 70, least_gain: 0}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """Trees that harden within 20 steps."""
    gate = {"name": "comet", "k": K, "gamma": 1.0, "entropy_weight": WEIGHT}
    optimizer = {"type": "AdamW", "params": {"lr": 0.02, "eps": 1e-7, "weight_decay": 0.0}}
    return write_config(
        tmp_path_factory.mktemp("window"),
        tiny_data,
        model={"num_experts": EXPERTS, "gate": gate},
        train={"max_steps": 20, "log_every": LOG},
        deepspeed={"optimizer": optimizer},
    )


def layer_of(*gates: Gate) -> MoE:
    return MoE(gates, DenseReLUBank(5, 3, 4, range(4)), SlotTable(4, num_gates=len(gates)))


def record(step: int, share: float, largest: float = math.log(4)) -> dict[str, Any]:
    return {"step": step, "entropy": share * largest}


def measured(window: EntropyWindow, *shares: tuple[int, float], log_every: int = 1) -> EntropyWindow:
    window.measure([layer_of(Comet(5, 4, k=1))], log_every, [record(step, share) for step, share in shares])
    return window


@pytest.mark.parametrize(
    ("shares", "is_open", "is_over"),
    [
        ([], False, False),
        ([1.0], False, False),
        ([1.0, 0.9], True, False),
        ([1.0, 0.9, 0.95], False, False),
        ([0.95, 0.6], True, False),
        ([0.6, math.nan], True, False),
        ([math.nan], False, False),
        ([0.9, 0.5], False, True),
        ([0.9, 0.5, 0.8], False, True),
    ],
)
def test_the_window_opens_below_the_first_share_and_closes_for_good_below_the_second(
    shares: list[float], is_open: bool, is_over: bool
) -> None:
    window = EntropyWindow(0.92, 0.55)
    for step, share in enumerate(shares, 1):
        measured(window, (step, share))
    assert (window.is_open, window.is_over) == (is_open, is_over)
    again = EntropyWindow(0.92, 0.55)
    if state := window.state_dict():
        again.load_state_dict(parse_json(json_line(state)))
    assert (again.is_open, again.is_over, again.share) == (is_open, is_over, window.share)


def test_what_is_collected_between_is_passed_over() -> None:
    assert measured(EntropyWindow(0.9, 0.5), (3, 0.4), (4, 0.7), (5, 0.3), log_every=4).is_open


def test_the_share_is_that_of_all_gates_of_all_layers_together() -> None:
    layers = [layer_of(Comet(5, 4, k=2, entropy_weight=0.5), Comet(5, 4, k=1)), layer_of(Comet(5, 4, k=3))]
    window = EntropyWindow(1, 0)
    window.measure(layers, 1, [record(1, 0.7, largest=(0.5 * 2 + 1 + 3) * math.log(4))])
    assert window.share == pytest.approx(0.7)


def test_an_entropy_that_nobody_records_is_an_error() -> None:
    with pytest.raises(ValueError, match="no entropy to measure"):
        EntropyWindow(1, 0).measure([layer_of(TopK(5, 4, k=2))], 1, [{"step": 1}])


def searched_steps(run: Path) -> list[int]:
    return steps_of(read_board(run), "assignment_search/loss_after")


def due_steps(run: Path) -> list[int]:
    """From the records alone: each step's own latest measurement, before which none was below the window."""
    share = {one["step"]: one["entropy"] / LARGEST for one in records_of(run) if one["step"] % LOG == 0}
    found = []
    for step in range(EVERY, 21, EVERY):
        before = [share[s] for s in sorted(share) if s < step]
        if before and before[-1] <= HIGH and min(before) >= LOW:
            found.append(step)
    return found


def test_ranks_search_at_the_same_steps_within_the_window(config: Path, tmp_path: Path) -> None:
    """Two ranks that write checkpoints between the measurements, for which numbers are collected too."""
    alone, together = tmp_path / "1", tmp_path / "2"
    (outcome,) = succeed(1, "train", "--run-dir", alone, config, SEARCH)
    more = ["parallel.expert_parallel_size=2", "train.checkpoint_every=4"]
    outcomes = succeed(2, "train", "--run-dir", together, config, SEARCH, *more)
    steps = searched_steps(alone)
    assert EVERY < steps[0] <= steps[-1] < 20, "closed before, and after"
    assert len(steps) > 1
    assert steps == due_steps(alone) == due_steps(together) == searched_steps(together)
    for one in (outcome, outcomes[0]):
        assert f"no assignment search after step {-(-steps[-1] // LOG) * LOG}: the gates' entropy is " in one.err
    assert largest_difference(tensors_of(alone), tensors_of(together)) < 1e-4


def test_gates_that_a_recovery_does_not_train_have_no_window(config: Path) -> None:
    loaded = load_config(config, [SEARCH])
    task = loaded.data.open(progress=False)
    model = build_model(loaded, task, SingleWorld())
    check_recovery(RecoverConfig(trained="all"), loaded, task, model)
    with pytest.raises(
        UserError, match=r"while_entropy=\[0\.97, 0\.5\]: recipe\.recover\.trained=experts leaves .* train all"
    ):
        check_recovery(RecoverConfig(trained="experts"), loaded, task, model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.gate={name: top_k}", "assignment_search={while_entropy: [0.9, 0.5]}"],
            r"while_entropy=\[0\.9, 0\.5\]: model\.gate\.name=top_k records no entropy .* comet or dselect_k",
        ),
        (
            ["model.gate.entropy_weight=0", "assignment_search={while_entropy: [0.9, 0.5]}"],
            r"model\.gate\.name=comet with entropy_weight=0 records no entropy .*gate\.entropy_weight above 0",
        ),
        (["assignment_search={while_entropy: [0.5, 0.9]}"], r"while_entropy=\[0\.5, 0\.9\]: .* the higher one"),
        (["assignment_search={while_entropy: [1.5, 0.9]}"], r"assignment_search\.while_entropy"),
        (
            ["assignment_search={while_entropy: [0.9, 0.5], at_steps: [4]}"],
            r"while_entropy=\[0\.9, 0\.5\]: at_steps=\[4\] .* one of them",
        ),
        (
            ["assignment_search={while_entropy: [0.9, 0.5], every_steps: 7}", "train.log_every=14"],
            r"train\.log_every=14, and the first search would follow step 21, but training ends after 20; .* smaller",
        ),
    ],
)
def test_a_window_that_cannot_be_seen_is_refused(
    config: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_new_run(config, overrides, tmp_path / "run")
