"""A part of a model trains; the rest, with its buffers, is bit-equal afterwards, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import step_directory
from dist_moe.engine.checkpoint.format import expert_ids_by_parameter
from dist_moe.engine.checkpoint.loading import load_checkpoint, load_weights
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.migration import migrate, state_bytes_per_expert
from dist_moe.engine.deepspeed.parameter_state import MASTER, read_parameter_state
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.trainable import hold_still
from dist_moe.errors import UserError
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import BatchNormOverRanks, MoE
from dist_moe.models import MoEModel
from dist_moe.parallel import Placement, SingleWorld, World, experts_of_rank, sum_over_ranks
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig
from dist_moe.recipes.callbacks.table_search import TableSearchCallback
from dist_moe.search import PermutationSearch
from dist_moe.search.layers import is_held
from tests.helpers.parity import owned_numbers
from tests.helpers.pool import on_ranks
from tests.helpers.runs import save_checkpoint

DIM, UNITS, EXPERTS, BATCH, STEPS, RANKS = 5, 6, 4, 24, 5, 2
ADAM = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}  # with this eps the size of a gradient matters
CLIPPING = 0.05
PARTS = {
    "experts": ("moe.experts.*",),
    "gates": ("*.gates.*", "*.slot_map.*"),
    "dense": ("below.*", "norm.*", "head.*"),
    "head": ("head.*",),
    "gates and below": ("*.gates.*", "below.weight"),
}
"""What trains, by name. Of the layers below in the last part the bias is held, and that of a trained module only."""
STAGES = [0, 1, 2, 3]


class Layers(MoEModel):
    """A normalised linear layer, experts behind a balanced gate and a learnt permutation, a head."""

    def __init__(self, world: World, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.below, self.norm = nn.Linear(DIM, UNITS), BatchNormOverRanks(UNITS)
        gate = TopK(UNITS, EXPERTS, 2, bias_update_rate=0.05)
        gate.sum_over_ranks = sum_over_ranks
        bank = DenseReLUBank(UNITS, UNITS, EXPERTS, experts_of_rank(EXPERTS, world), dropout)
        self.moe = MoE(gate, bank, PermutationSearch(EXPERTS, 3), world)
        self.head = nn.Linear(UNITS, 1)
        with torch.no_grad():
            gate.bias_steps.copy_(torch.tensor([1, 0, -1, 0]))
            self.norm.running_mean.add_(0.1)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.moe(torch.relu(self.norm(self.below(x_BD.to(self.below.weight.dtype)))))
        return self.head(result.outputs[0]).squeeze(1), result.aux


def dropout_of(part: str) -> float:
    """Held experts are deterministic; those that train must be so for the comparison."""
    return 0.0 if part == "experts" else 0.5


def loss_of(model: nn.Module, step: int, rows: slice) -> Tensor:
    x_BD = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step))[rows]
    predicted_B, aux = model(x_BD)
    return F.mse_loss(predicted_B.float(), x_BD.prod(dim=1)) + sum(aux.values())


def train_step(model: MoEModel, module: nn.Module, step: int, rows: slice) -> Iterator[Tensor]:
    """Yields the loss, from which whoever asks steps."""
    module.train()
    model.begin_step(step)
    yield loss_of(module, step, rows)
    model.end_step(skipped=False)


def tensors_of(model: nn.Module, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, experts one by one, and buffers, copied."""
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, _, ids in expert_ids_by_parameter(model):
        if ids is None:
            found[name] = masters[name].clone()
        else:
            found |= {f"{name}|{e}": row.clone() for e, row in zip(ids, masters[name], strict=True)}
    return found


@cache
def plain(part: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain torch, one process, whole batches: everything before and after; what is held is left out by hand."""
    model = Layers(SingleWorld(), dropout_of(part))
    trained = {name: p for name, p in model.named_parameters() if trains(part, name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    before = tensors_of(model, dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(trained.values(), **ADAM)
    for step in range(steps):
        model.train()
        if not trains(part, "norm.weight"):
            model.norm.eval()
        if trains(part, "moe.slot_map.relaxed"):
            model.moe.slot_map.begin_step()
        else:
            model.moe.slot_map.eval()
        if not trains(part, "moe.gates.0.weight"):
            model.moe.gates.eval()
        if not trains(part, "moe.experts.weight"):
            model.moe.experts.eval()
        optimizer.zero_grad()
        loss_of(model, step, slice(None)).backward()
        nn.utils.clip_grad_norm_(trained.values(), CLIPPING)
        optimizer.step()
        if trains(part, "moe.gates.0.weight"):
            model.moe.gates[0].end_step()
    return before, tensors_of(model, {name: p.detach() for name, p in model.named_parameters()})


def trains(part: str, name: str) -> bool:
    """Written out once more, without patterns."""
    return {
        "experts": name.startswith("moe.experts."),
        "gates": ".gates." in name or ".slot_map." in name,
        "dense": name.split(".")[0] in ("below", "norm", "head"),
        "head": name.startswith("head."),
        "gates and below": ".gates." in name or name == "below.weight",
    }[part]


@dataclass(frozen=True)
class Trained:
    """``states``: the keys of each parameter. ``moved``, ``loaded``: tensors that differ after experts
    went and came back, and after loading at another stage. ``again``: after one more step there."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    states: dict[str, list[str]]
    owned: int
    expert_bytes: int
    moved: list[str]
    loaded: list[str]
    again: dict[str, Tensor]


def engine_of(model: nn.Module, groups: ProcessGroups, stage: int, **more: Any) -> ExpertParallelEngine:
    zero = {"stage": stage, "reduce_bucket_size": 40}
    zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 50} if stage == 3 else {}
    section = {"optimizer": {"type": "AdamW", "params": dict(ADAM)}, "zero_optimization": zero}
    section |= {"gradient_clipping": CLIPPING, **more}
    return ExpertParallelEngine(model, complete_deepspeed_section(section, BATCH, RANKS), groups)


def state_of(engine: ExpertParallelEngine) -> dict[str, Tensor]:
    state = read_parameter_state(engine)
    return tensors_of(engine.module, {name: tensors[MASTER] for name, tensors in state.tensors.items()})


def step_with(engine: ExpertParallelEngine, step: int) -> None:
    rank, size = engine.process_groups.environment.rank, BATCH // RANKS
    for loss in train_step(engine.module, engine, step, slice(rank * size, (rank + 1) * size)):
        engine.backward(loss)
        engine.step()


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not one[name].equal(other[name])]


def train_part(part: str, stage: int, groups: ProcessGroups, root: Path) -> Trained:
    model = Layers(groups.world, dropout_of(part))
    with hold_still(model, PARTS[part]):
        engine = engine_of(model, groups, stage)
        before = state_of(engine)
        for step in range(STEPS):
            step_with(engine, step)
        after, owned = state_of(engine), owned_numbers(engine)
        states = {name: list(tensors) for name, tensors in read_parameter_state(engine).tensors.items()}
        expert_bytes = state_bytes_per_expert(engine, model.moe)
        save_checkpoint(engine, root, STEPS, keep=1)
        order = tuple(reversed(range(EXPERTS)))
        migrate(engine, model.moe, Placement(order, groups.world.size))
        away = {name for name in state_of(engine) if "|" in name}
        assert groups.world.size == 1 or not away & after.keys()
        migrate(engine, model.moe, Placement.identity(EXPERTS, groups.world.size))
        moved = different(state_of(engine), after)
        engine.destroy()
    model = Layers(groups.world, dropout_of(part))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(1)
    with hold_still(model, PARTS[part]):
        engine = engine_of(model, groups, (stage + 1) % 4)
        load_checkpoint(engine, step_directory(root, STEPS))
        loaded = different(state_of(engine), after)
        step_with(engine, STEPS)
        again = state_of(engine)
        engine.destroy()
    return Trained(before, after, states, owned, expert_bytes, moved, loaded, again)


def train_parts(ep: int, stages: list[int], root: Path) -> dict[tuple[str, int], Trained]:
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        cells = [(part, stage) for part in PARTS for stage in stages]
        return {(p, s): train_part(p, s, groups, root / f"{p}-{s}") for p, s in cells}


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("stages", [[0, 1], [2, 3]], ids=str)
def test_the_part_trains_and_the_rest_is_bit_equal(ep: int, stages: list[int], tmp_path: Path) -> None:
    sizes = {name: parameter.numel() for name, parameter in Layers(SingleWorld(), 0.0).named_parameters()}
    experts = [name for name in sizes if name.startswith("moe.experts.")]
    for cells in on_ranks(RANKS, train_parts, ep, stages, tmp_path):
        for (part, stage), found in cells.items():
            where, (before, wanted) = f"{part}, stage {stage}", plain(part, STEPS)
            for name, tensor in found.after.items():
                parameter = name.split("|")[0]
                moves = trains(part, parameter) and not before[name].equal(wanted[name])
                if not trains(part, parameter):
                    assert tensor.equal(found.before[name]), (where, name)
                    assert tensor.equal(before[name]), (where, name)
                assert (tensor.double() - wanted[name].double()).abs().max() < 1e-5, (where, name)
                assert moves == (not tensor.equal(found.before[name])), (where, name)
            for name, keys in found.states.items():
                assert (keys == [MASTER]) != trains(part, name), (where, name)
                assert len(keys) in (1, 3), (where, name)
            local = {name: size // ep if name in experts else size for name, size in sizes.items()}
            numbers = sum(size for name, size in local.items() if trains(part, name))
            assert found.owned >= numbers // (RANKS if stage == 3 else 1), where
            assert found.owned <= numbers + 30, where  # padding
            per_expert = sum(sizes[name] for name in experts) // EXPERTS * 4
            assert found.expert_bytes == per_expert * (3 if part == "experts" else 1), where
            assert (found.moved, found.loaded) == ([], []), where
            wanted = plain(part, STEPS + 1)[1]
            assert [n for n, t in found.again.items() if (t - wanted[n]).double().abs().max() > 1e-5] == [], where


def test_afterwards_everything_is_as_before() -> None:
    model = Layers(SingleWorld(), 0.5)
    model.head.bias.requires_grad_(False)
    model.below.eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with hold_still(model, lambda name: "moe.gates" in name or name == "head.bias"):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names == ["moe.gates.0.weight", "moe.gates.0.bias"]
        held = {name for name, module in model.named_modules() if is_held(module)}
        assert held == {"below", "norm", "moe.experts", "moe.slot_map"}
        assert not model.learning
        trainer: Any = SimpleNamespace(model=model, tables=model.tables, steps_per_epoch=1)
        TableSearchCallback(SwapScheduleConfig(), None, (), 0).after_step(trainer, 1)  # no task is asked
        model.train()
        assert [name for name, module in model.named_modules() if not module.training] == [
            name for name, _ in model.named_modules() if name in held
        ]
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert not any(is_held(module) for module in model.modules())
    assert model.learning


@pytest.mark.parametrize(
    ("trained", "part"),
    [(["*.gate.*"], r"trained=\*\.gate\.\*: no parameter"), (["*.table"], "no parameter would be trained")],
)
def test_refusals(trained: list[str], part: str) -> None:
    model = Layers(SingleWorld(), 0.0)
    with pytest.raises(UserError, match=part), hold_still(model, trained):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


def load_with_other_parts(root: Path) -> str:
    """A checkpoint of all parts is loaded by a run that trains experts; the other way round it is refused: how."""
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=1)) as groups:
        for saved, loaded in (("*", "moe.experts.*"), ("moe.experts.*", "*")):
            model = Layers(groups.world, 0.0)
            with hold_still(model, [saved]):
                engine = engine_of(model, groups, 1, **schedule)
                step_with(engine, 0)
                save_checkpoint(engine, root, 1, keep=1)
                engine.destroy()
            model = Layers(groups.world, 0.0)
            with hold_still(model, [loaded]):
                engine = engine_of(model, groups, 1, **schedule)
                if saved == "*":
                    assert load_checkpoint(engine, step_directory(root, 1)).step == 1
                    assert engine.lr_scheduler.steps == 1
                else:
                    with pytest.raises(UserError) as error:
                        load_checkpoint(engine, step_directory(root, 1))
                engine.destroy()
    return str(error.value)


def test_a_checkpoint_of_a_run_that_trained_another_part(tmp_path: Path) -> None:
    refusal, _ = on_ranks(RANKS, load_with_other_parts, tmp_path)
    assert "has no optimizer state but ['master']" in refusal


def keep_bits(stages: list[int], root: Path) -> list[list[str]]:
    """In bf16, a held parameter's fp32 master, once loaded, comes out of the next checkpoint to the bit."""
    lost = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=2)) as groups:
        engine = engine_of(Layers(groups.world, 0.0), groups, 1)
        save_checkpoint(engine, root, 0, keep=1)
        engine.destroy()
        for stage in stages:
            model = Layers(groups.world, 0.0)
            with hold_still(model, PARTS["head"]):
                engine = engine_of(model, groups, stage, bf16={"enabled": True})
                load_weights(engine, step_directory(root, 0))
                step_with(engine, 0)
                save_checkpoint(engine, root / str(stage), 1, keep=1)
                engine.destroy()
            if groups.environment.rank == 0:
                ours, theirs = read_model(step_directory(root / str(stage), 1)), read_model(step_directory(root, 0))
                lost.append([name for name in ours if not ours[name].equal(theirs[name])])
                whole = Layers(SingleWorld(), 0.0)
                place_weights(whole, ours)
    return lost


def test_in_bf16_held_masters_keep_their_bits(tmp_path: Path) -> None:
    lost, _ = on_ranks(RANKS, keep_bits, [1, 3], tmp_path)
    assert lost == [["head.bias", "head.weight"]] * 2
