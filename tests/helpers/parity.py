"""A few training steps of a small model: by plain torch on one process, and by the engine in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe.data.movielens import PairBatch
from dist_moe.engine.checkpoint.format import expert_ids_by_parameter
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.parameter_state import MASTER, read_parameter_state
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.models import RecommenderConfig, RunShape
from dist_moe.models.recommender import Recommender
from dist_moe.parallel import SingleWorld, World
from dist_moe.tasks.objective import WeightedObjective
from dist_moe.tasks.recommendation.task import RecommendationTask

EXPERTS, USERS, ITEMS = 8, 40, 30
EXPERT_OF_SLOT = [3, 0, 0, 7, 1, 2, 4, 5, 6, 0, 3]
"""A slot map as merging leaves it: several slots lead to one expert, from any rank."""
BATCH = 72  # divisible by 1, 2, 3, 4 and 8 ranks times 1 and 3 micro-batches
STEPS = 3
CLIPPING = 0.1
ADAM = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01}  # with this eps the size of a gradient matters
SPLIT_SCALE = 2000.0

Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """``ranks`` processes, experts split over ``ep`` of them; ``zero``: more of DeepSpeed's zero_optimization."""

    ranks: int
    ep: int
    stage: int
    bf16: bool = False
    accumulation: int = 1
    clipping: bool = False
    zero: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()

    def section(self) -> dict[str, Any]:
        """Buckets and sub-groups so small that there are several of each; at stage 3 nothing is kept whole."""
        small = {"reduce_bucket_size": 1500}
        if self.stage == 3:
            small |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 200}
        return {
            "optimizer": {"type": "AdamW", "params": dict(ADAM)},
            "zero_optimization": {"stage": self.stage} | small | dict(self.zero),
            "bf16": {"enabled": self.bf16},
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": CLIPPING if self.clipping else 0.0,
        }


@dataclass(frozen=True)
class Course:
    """``norms``: of all gradients, before clipping, by step. ``masters``: by parameter, experts one by one."""

    norms: list[float]
    masters: Numbers = field(repr=False)


class Objective(RecommendationTask):
    """The recommender's losses, without a data set."""

    def __init__(self) -> None:
        pass


def small_model(world: World, **options: Any) -> Recommender:
    """The recommender with sparse routes from the start: some experts get no token, none gets all."""
    torch.manual_seed(3)
    gate = {"name": "comet", "k": 2, "gamma": 0.1, "entropy_weight": 0.05}
    sizes = {"embedding_dim": 4, "num_experts": EXPERTS, "experts": {"units": 6, "dropout": 0.0}, "tower_units": 5}
    config = RecommenderConfig.model_validate(sizes | {"gate": gate} | options)
    model = config.build(USERS, ITEMS, RunShape(world, steps_per_epoch=100))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "split_weight" in name:
                parameter.mul_(SPLIT_SCALE)
    if "num_slots" in options:
        model.tables["moe"].table.copy_(torch.tensor(EXPERT_OF_SLOT))
    return model


def step_of_pairs(step: int) -> PairBatch:
    """All pairs of a step; every rating is positive for half of them."""
    drawn = torch.Generator().manual_seed(step)
    user_B, item_B = (torch.randint(count, (BATCH,), generator=drawn) for count in (USERS, ITEMS))
    rating_B = torch.randint(-4, 6, (BATCH,), generator=drawn).clamp(min=0).float()
    return PairBatch(user_B, item_B, rating_B, BATCH, int((rating_B > 0).sum()))


def micro_batches(step: int, rank: int, ranks: int, accumulation: int) -> Iterator[PairBatch]:
    whole, size = step_of_pairs(step), BATCH // (ranks * accumulation)
    for micro in range(accumulation):
        rows = slice((micro * ranks + rank) * size, (micro * ranks + rank + 1) * size)
        columns = (whole.user_B[rows], whole.item_B[rows], whole.rating_B[rows])
        yield PairBatch(*columns, whole.examples_in_step, whole.rated_in_step)


@cache
def reference(clipping: bool, bf16: bool = False, model_options: tuple[tuple[str, Any], ...] = ()) -> Course:
    """Plain torch, one process, all experts in one bank, whole batches.

    With ``bf16`` the model computes in bf16 while masters and moments are fp32, as mixed precision is
    defined: parameters are the masters rounded, also at first.
    """
    model = small_model(SingleWorld(), **dict(model_options))
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if bf16:
        model.bfloat16()
        masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), **ADAM)
    norms = []
    for step in range(STEPS):
        model.zero_grad()
        plain_loss(model, step_of_pairs(step)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), CLIPPING if clipping else 1e9)))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    return Course(norms, dict(by_expert(model, masters)))


@cache
def initial_masters(bf16: bool) -> Numbers:
    model = small_model(SingleWorld())
    if bf16:
        model.bfloat16()
    return dict(by_expert(model, {name: p.detach().float() for name, p in model.named_parameters()}))


def relative_error(course: Course, clipping: bool) -> float:
    """How far the bf16 ``course`` led from where the bf16 reference went, as a share of the way it went."""
    wanted, start = reference(clipping, bf16=True).masters, initial_masters(bf16=True)
    off = torch.cat([(tensor - wanted[name]).flatten() for name, tensor in course.masters.items()])
    way = torch.cat([(wanted[name] - start[name]).flatten() for name in course.masters])
    return float(off.norm() / way.norm())


def plain_loss(model: Recommender, batch: PairBatch) -> Tensor:
    """Half the cross-entropy of "watched", half the squared error of the rated ones, and the trees' entropy."""
    output = model(*batch.inputs)
    logit_B, stars_B = (prediction.float() for prediction in output.predictions)
    rated_B = batch.rating_B > 0
    bce = F.binary_cross_entropy_with_logits(logit_B, rated_B.float())
    mse = F.mse_loss(stars_B[rated_B], batch.rating_B[rated_B])
    return 0.5 * bce + 0.5 * mse + output.aux["entropy"]


def run_cells(cells: list[Cell]) -> list[Course]:
    """On every rank: all cells, which share ranks and expert-parallel size, in the same process groups."""
    for cell in cells:
        check_deepspeed_section(cell.section(), BATCH, cell.ranks)
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=cells[0].ep)) as groups:
        return [run_cell(cell, groups) for cell in cells]


def run_cell(cell: Cell, groups: ProcessGroups) -> Course:
    engine = engine_of(cell, groups)
    try:
        norms = [take_step(engine, cell, step) for step in range(STEPS)]
        return Course(norms, masters_of(engine))
    finally:
        engine.destroy()


def engine_of(cell: Cell, groups: ProcessGroups) -> ExpertParallelEngine:
    completed = complete_deepspeed_section(cell.section(), BATCH, cell.ranks)
    return ExpertParallelEngine(small_model(groups.world, **dict(cell.model)), completed, groups)


def take_step(engine: ExpertParallelEngine, cell: Cell, step: int) -> float:
    """One step; the norm of its gradients."""
    engine.train()
    objective = WeightedObjective(Objective(), (0.5, 0.5), cell.ranks * cell.accumulation)
    rank = engine.process_groups.environment.rank
    for batch in micro_batches(step, rank, cell.ranks, cell.accumulation):
        engine.backward(objective(engine, batch).loss)
        engine.step()
    return engine.grad_norm


def masters_of(engine: ExpertParallelEngine) -> Numbers:
    state = read_parameter_state(engine)
    return dict(by_expert(engine.module, {name: tensors[MASTER] for name, tensors in state.tensors.items()}))


def owned_numbers(engine: ExpertParallelEngine) -> int:
    """Numbers that the optimizer steps on this rank: this rank's part of them at ZeRO stages 1 to 3."""
    if engine.shards_parameters:
        return sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    if engine.zero_optimization():
        return sum(parameter.numel() for group in engine.optimizer.bit16_groups for parameter in group)
    return sum(parameter.numel() for group in engine.optimizer.param_groups for parameter in group["params"])


def by_expert(model: nn.Module, tensors: Numbers) -> Iterator[tuple[str, Tensor]]:
    for name, _, expert_ids in expert_ids_by_parameter(model):
        if expert_ids is None:
            yield name, tensors[name].clone()
        else:
            yield from ((f"{name}|{e}", tensor.clone()) for e, tensor in zip(expert_ids, tensors[name], strict=True))
