"""What is planned before anything exists is what a run then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import run_here
from tests.helpers.held import check_largest_batch, check_states, engines_of, peak_of_a_step, plan_of, size_of
from tests.helpers.pool import on_ranks
from tests.helpers.runs import write_config

FACTOR = 2.0
"""By which the estimate of activations may miss what torch's profiler measures, upwards or downwards."""

LAYOUTS = [(1, 1), (2, 2), (2, 1)]
OPTIMIZERS = {
    "AdamW": "{lr: 0.01}",
    "SGD": "{lr: 0.01, momentum: 0.9}",
    "RMSprop": "{lr: 0.01}",
}
UNEVEN = ["model.num_experts=6", "model.embedding_dim=7", "model.experts.units=13", "model.tower_units=5"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), tiny_data)


def overrides(ep: int, stage: int, optimizer: str) -> list[str]:
    return [
        f"parallel.expert_parallel_size={ep}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"deepspeed.optimizer={{type: {optimizer}, params: {OPTIMIZERS[optimizer]}}}",
    ]


@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
def test_parameters_masters_and_optimizer_are_exact(config: Path, tmp_path: Path, ranks: int, ep: int) -> None:
    cases = [overrides(ep, stage, name) + UNEVEN for stage in (0, 1, 2) for name in OPTIMIZERS]
    states = check_states(config, tmp_path / "run", ranks, cases)
    assert any(state.padding for state in states) == (ranks > 1)  # the numbers of elements are even


KEEP_NONE = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
KEEP_SOME = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
BF16 = "deepspeed.bf16.enabled=true"


@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
def test_stage_3_is_exact(config: Path, tmp_path: Path, ranks: int, ep: int) -> None:
    cases = [overrides(ep, 3, name) + UNEVEN for name in OPTIMIZERS]
    cases += [[*cases[0], KEEP_NONE], [*cases[0], KEEP_NONE, BF16]]
    if ranks > ep:  # else the experts' parameters are their own slices, and DeepSpeed copies some of them
        cases.append([*cases[0], KEEP_SOME, BF16])
    for case, state in zip(cases, check_states(config, tmp_path / "run", ranks, cases), strict=True):
        assert (state.kept > 0) == (ranks > 1 and KEEP_NONE not in case)
        assert (state.padding > 0) == (ranks > 1)


def gathered_in_steps(config: Path, run: str, cases: list[list[str]]) -> list[int]:
    """Most bytes of whole parameters that there are at once within three steps."""
    found = []
    for engine, train in engines_of(config, run, cases):
        parameters, seen = list(engine.module.parameters()), [0]

        def look(*ignored: Any, of: Any = parameters, seen: list[int] = seen) -> None:
            seen.append(size_of(parameter.data for parameter in of))

        for module in engine.module.modules():
            module.register_forward_pre_hook(look)
        for parameter in parameters:
            parameter.register_hook(look)
        for number in range(3):
            train(number)
        found.append(max(seen))
    return found


def test_stage_3_gathers_what_is_planned(config: Path, tmp_path: Path) -> None:
    """Everything with DeepSpeed's own settings; little where parameters are not to be kept from use to use."""
    zero = "deepspeed.zero_optimization"
    frugal = [f"{zero}.stage3_max_reuse_distance=0", f"{zero}.stage3_prefetch_bucket_size=0"]
    cases = [overrides(1, 3, "AdamW") + UNEVEN + [KEEP_NONE] + more for more in ([], frugal)]
    for all_of_it, little in on_ranks(2, gathered_in_steps, config, str(tmp_path / "run"), cases):
        states = [plan_of(config, 2, *case).state for case in cases]
        whole = plan_of(config, 2, *cases[0]).states[0]
        assert states[0].gathered >= all_of_it >= whole.dense_parameters + whole.expert_parameters
        assert states[0].gathered < 1.05 * all_of_it
        assert states[1].gathered >= little > states[1].gathered / 2
        assert states[1].gathered < states[0].gathered


@pytest.mark.parametrize("gate", ["{name: top_k, k: 2}", "{name: softmax}", "{name: comet, k: 2}"])
def test_activations_are_near_the_measured_peak(config: Path, tmp_path: Path, gate: str) -> None:
    settings = [f"model.gate={gate}", "train.batch_size=2048", "model.embedding_dim=32", "model.experts.units=64"]
    ((peak, rows),) = on_ranks(1, peak_of_a_step, config, str(tmp_path / "run"), settings)
    plan = plan_of(config, 1, *settings)
    load = next((load for load in plan.loads if load.experts_per_token == rows // 2048), plan.loads[2])
    planned = load.activations + plan.states[0].gradients
    assert 1 / FACTOR < planned / peak < FACTOR


def test_the_worst_load_grows_with_the_group(config: Path) -> None:
    ranks = "parallel.expert_parallel_size=2"
    even, worst, every = plan_of(config, 2, ranks, "model.num_experts=16", "model.gate={name: top_k, k: 2}").loads
    assert (even.experts_per_token, worst.experts_per_token, every.experts_per_token) == (4, 4, 16)
    assert even.received_rows == 32 * 4
    assert worst.received_rows == 2 * 32 * 4
    assert every.received_rows == 2 * 32 * 8
    assert even.activations < worst.activations < every.activations


def test_the_largest_batch_fits_and_no_larger_one(config: Path) -> None:
    check_largest_batch(config, load=2, memory=100 * 2**20)


def test_higher_stages_hold_less(config: Path) -> None:
    states = plan_of(config, 2, "deepspeed.zero_optimization={stage: 1, reduce_bucket_size: 1}").states
    assert states[0].optimizer > states[1].optimizer == states[2].optimizer
    assert states[1].gradients > states[2].gradients
    assert states[2].dense_parameters > states[3].dense_parameters
    assert states[3].expert_parameters > 0


def test_a_table_search_takes_fp64_copies_and_results(config: Path) -> None:
    """Recorded: 4 experts of width 16 on 300 examples. Streamed: no more than the chunk beside the batch's tokens."""
    none, swaps = plan_of(config, 2), plan_of(config, 2, "swap_search={examples: 600}")
    copies = 2 * (none.states[0].dense_parameters + none.states[0].expert_parameters)
    assert none.search == 0
    assert swaps.search == 300 * 4 * 16 * 8 + copies
    few, many = (plan_of(config, 2, f"assignment_search={{chunk_bytes: {size}}}").search for size in (2**14, 2**30))
    assert copies < few < many - 2**14


def test_the_command(config: Path) -> None:
    table = run_here(
        ["plan", str(config), "--ranks", "2", "--memory-gib", "4", "train.batch_size=128", "swap_search={}"]
    )
    assert table.code == 0, table.err
    assert "while a table search lasts, at most, beside these and a pass in fp64: 1." in table.out
    assert "2 rank(s), experts over 1, 64 tokens" in table.out
    assert "ZeRO stage 1 *" in table.out
    plain = json.loads(run_here(["plan", str(config), "--ranks", "2", "--json"]).out)
    assert plain["ranks"] == 2
    assert plain["states"][1]["masters"] > 0
    refused = run_here(["plan", str(config), "--ranks", "3"])
    assert refused.code == 2
    assert "train.batch_size=64 is not divisible by 3" in refused.err
    assert run_here(["plan", str(config), "--ranks", "0"]).code == 2
    assert run_here(["plan", str(config), "--memory-gib", "-1"]).code == 2
    assert torch.get_default_device().type == "cpu"
