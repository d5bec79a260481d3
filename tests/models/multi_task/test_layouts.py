"""Recommenders with batch normalisation on several ranks are those of one: emulated, and real in DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.checkpoint.format import read_trainer_state
from dist_moe.engine.checkpoint.models import read_model
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss, fit
from dist_moe.experts import MlpConfig
from dist_moe.gates import Softmax
from dist_moe.layer import MoE
from dist_moe.models import MODELS, RunShape
from dist_moe.parallel import ExchangeOptions, FlatExchange, Placement, SingleWorld, World, experts_of_rank
from tests.helpers.commands import succeed
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.helpers.parity import by_expert
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of
from tests.helpers.tables import table_config
from tests.helpers.worlds import emulate, emulated_in_nodes
from tests.models.multi_task.naive import FEATURES, SMALL, TARGETS, batch_of, draw_parameters, part_of, small_model
from tests.models.shares import assert_shares, joined

ROWS, STEPS = 12, 4
SPLITS = [[5, 7], [12, 0], [3, 0, 5, 4]]
models = pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple", "home"])


def cotangent() -> Tensor:
    return torch.randn(len(TARGETS), ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def step(name: str, world: World | None, rows: slice, moved: bool = False) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The model after two passes, the last one's predictions, its gradients; ``moved``: experts in falling order."""
    model = small_model(name, world)
    for layer in model.moe_layers.values() if moved else ():
        count = layer.experts.num_experts
        layer.place(Placement(tuple(reversed(range(count))), layer.world.size))
        draw_parameters(model)
    model(*part_of(batch_of(ROWS, seed=1), rows))
    prediction_TB = torch.stack(model(*part_of(batch_of(ROWS), rows)).predictions)
    loss = (prediction_TB * cotangent()[:, rows]).sum()
    return model, prediction_TB.detach(), gradients(loss, dict(model.named_parameters()))


def slices(sizes: Sequence[int]) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@models
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_ranks_are_one(name: str, sizes: list[int]) -> None:
    """Also of ranks without rows, and where rows would travel in chunks if experts need not see them all."""
    whole, predictions, wanted = step(name, None, slice(None))
    options = ExchangeOptions(overlap_chunks=2)
    of_ranks = emulate(len(sizes), lambda world: step(name, world, slices(sizes)[world.rank]), options=options)
    assert_shares([model for model, _, _ in of_ranks], whole)
    assert_same(torch.cat([found for _, found, _ in of_ranks], dim=1), predictions)
    assert_all_same(joined([found for _, _, found in of_ranks]), wanted, 1e-9)
    for model, _, _ in of_ranks:
        assert_all_same(statistics_of(model), statistics_of(whole))
    assert name == "shared_bottom" or any(bool((mean != 0).any()) for mean in statistics_of(whole).values())


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".running_" in name}


@pytest.mark.parametrize("name", ["ple", "home"])
def test_nodes_and_experts_elsewhere_change_nothing(name: str) -> None:
    """Ranks in nodes, for which rows cross once; and experts that live in another order, by their ids as ever."""

    whole, predictions, wanted = step(name, None, slice(None))
    rows = slices([3, 0, 5, 4])
    of_ranks = emulated_in_nodes(2)(4, lambda world: step(name, world, rows[world.rank], moved=True))
    assert_same(torch.cat([found for _, found, _ in of_ranks], dim=1), predictions)
    for model, _, found in of_ranks:
        assert_all_same(statistics_of(model), statistics_of(whole))
        for layer_name, layer in model.moe_layers.items():
            ids = list(layer.experts.expert_ids)
            assert ids != list(experts_of_rank(layer.experts.num_experts, layer.world))
            for leaf, _ in layer.experts.named_parameters():
                full = f"{layer_name}.experts.{leaf}"
                assert_same(found[full], wanted[full][ids], 1e-9)


def test_experts_that_must_see_all_rows_are_computed_once() -> None:
    def check(world: World) -> None:
        gate, bank = Softmax(5, 4), MlpConfig(units=(5,), batch_norm=True).build(5, 4, experts_of_rank(4, world))
        assert isinstance(MoE(gate, bank, world=world, shared=nn.Identity()).exchange, FlatExchange)
        with pytest.raises(ValueError, match="cannot be computed again"):
            MoE(gate, bank, world=world, recompute_experts=True)

    emulate(2, check, options=ExchangeOptions(overlap_chunks=2))


@models
def test_built_without_storage(name: str) -> None:
    with torch.device("meta"):
        model = MODELS.by_name[name].model_validate(SMALL[name]).build(FEATURES, TARGETS, RunShape(SingleWorld(), 9))
    whole = small_model(name, embedding_dim=16, tower_units=[64])
    assert {leaf: p.shape for leaf, p in model.named_parameters()} == {
        leaf: p.shape for leaf, p in whole.named_parameters()
    }
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_an_expert_without_rows_keeps_its_statistics() -> None:
    model = small_model("mmoe", gate={"name": "top_k", "k": 1})
    with torch.no_grad():
        for gate in model.moe.gates:
            gate.bias.copy_(torch.tensor([1e3, 0.0, 0.0, 0.0]))
    model(*batch_of(ROWS))
    (mean_EF, var_EF) = statistics_of(model).values()
    assert mean_EF[0].all()
    assert not mean_EF[1:].any()
    assert torch.equal(var_EF[1:], torch.ones_like(var_EF[1:]))
    assert all(prediction.isfinite().all() for prediction in model.eval()(*batch_of(ROWS)).predictions)


def test_a_skipped_step_leaves_no_trace_in_statistics() -> None:
    model = small_model("home")
    before = {name: buffer.clone() for name, buffer in statistics_of(model).items()}
    model.begin_step(0)
    ids_BC, numeric_BM, lists_BP = batch_of(ROWS)
    model(ids_BC, numeric_BM * torch.nan, lists_BP)
    assert not all(buffer.isfinite().all() for buffer in statistics_of(model).values())
    model.end_step(skipped=True)
    assert_all_same(statistics_of(model), before, 0)


class Feed:
    """This rank's rows of every step: ``sizes[rank]`` of them, of ``ROWS``."""

    steps_per_epoch = STEPS

    def __init__(self, rows: slice) -> None:
        self._rows = rows

    def micro_batches(self, step: int) -> list[Any]:
        return [(part_of(batch_of(ROWS, seed=step), self._rows), (torch.arange(ROWS) % 2.0)[self._rows])]


def objective(model: nn.Module, batch: Any) -> StepLoss:
    """The engine averages over the ranks: whose sum over rows is divided by the rows of one."""
    inputs, target_B = batch
    ranks = LaunchEnvironment.read().world_size
    errors = [(prediction_B.float() - target_B).square().sum() for prediction_B in model(*inputs).predictions]
    return StepLoss(ranks * sum(errors) / ROWS)


def trained(
    name: str, ep: int, stage: int, sizes: list[int], run: Path | None = None, first: int = 0, bf16: bool = False
) -> dict[str, Tensor]:
    """Parameters and statistics after ``STEPS`` steps, those before ``first`` taken from a checkpoint of ``run``."""
    environment = LaunchEnvironment.read()
    section = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
    }
    settings = TrainConfig(max_steps=STEPS if first or run is None else 2, batch_size=4 * len(sizes), log_every=2)
    with process_groups(environment, ParallelConfig(expert_parallel_size=ep)) as groups:
        model = small_model(name, groups.world).float()
        feed = Feed(slices(sizes)[environment.rank])
        directory = None if run is None else RunDirectory(run)
        resumed = newest_checkpoint(run) if run is not None and first else None
        fit(model, feed, objective, settings, deepspeed=section, groups=groups, run=directory, resume_from=resumed)
        parameters = {leaf: parameter.detach() for leaf, parameter in model.named_parameters()}
        return dict(by_expert(model, parameters)) | statistics_of(model)


def assert_trained_alike(of_ranks: list[dict[str, Tensor]], name: str, tolerance: float = 1e-5) -> None:
    (alone,) = on_ranks(1, trained, name, 1, 0, [ROWS])
    for of_rank in of_ranks:
        for leaf, value in of_rank.items():
            assert_same(value, alone[leaf], tolerance, leaf)


@pytest.mark.parametrize(
    ("name", "ep", "stage", "sizes"),
    [
        ("home", 1, 1, [6, 6]),
        ("home", 2, 0, [12, 0]),
        ("home", 2, 2, [5, 7]),
        ("home", 2, 3, [6, 6]),
        ("home", 2, 3, [3, 0, 5, 4]),
        ("home", 4, 1, [3, 3, 3, 3]),
        ("ple", 2, 3, [4, 8]),
        ("mmoe", 2, 1, [4, 8]),
        ("shared_bottom", 1, 2, [4, 8]),
    ],
    ids=str,
)
def test_trained_in_any_layout_as_by_one_process(name: str, ep: int, stage: int, sizes: list[int]) -> None:
    assert_trained_alike(on_ranks(len(sizes), trained, name, ep, stage, sizes), name)


def test_statistics_are_fp32_in_a_model_of_bf16() -> None:
    one, other = on_ranks(2, trained, "home", 2, 1, [6, 6], None, 0, True)
    for leaf in (leaf for leaf in one if ".running_" in leaf):
        assert torch.equal(one[leaf], other[leaf])
        assert not torch.equal(one[leaf], one[leaf].bfloat16().float())


def test_checkpoints_go_on_in_another_layout(tmp_path: Path) -> None:
    on_ranks(2, trained, "home", 2, 2, [5, 7], tmp_path)
    kept = read_model(newest_checkpoint(tmp_path))
    assert kept["levels.1.experts.norm.running_mean"].shape == (16, 4)
    assert kept["levels.1.experts.norm_weight"].shape == (16, 4)
    assert_trained_alike(on_ranks(4, trained, "home", 4, 3, [3, 0, 5, 4], tmp_path, 2), "home")


def test_experts_that_move_while_levels_train_change_nothing(tmp_path: Path) -> None:
    """Levels have 6 and 12 experts, and so have the records of their load."""
    config = table_config(tmp_path, "home", train={"log_every": 4})
    split, gate = "parallel.expert_parallel_size=2", "model.gate={name: top_k, k: 1}"
    staying, moved = tmp_path / "staying", tmp_path / "moved"
    succeed(2, "train", config, "--run-dir", staying, split, gate)
    moves = "placement={every_steps: 10, threshold: 1, least_return: 0, slack: 0, window: 16}"
    succeed(2, "train", config, "--run-dir", moved, split, gate, moves)
    assert read_trainer_state(newest_checkpoint(moved)).placements
    torch.testing.assert_close(losses_of(moved), losses_of(staying), rtol=1e-4, atol=1e-5)
    (widths,) = {tuple(map(len, record["load"])) for record in records_of(moved)}
    assert widths == (6, 12)
