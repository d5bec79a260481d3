"""A small student with experts and two heads, its teachers, and steps of it by the engine in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.training import Trainer
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Gate, TopK
from dist_moe.layer import MoE
from dist_moe.models import ModelOutput, MoEModel
from dist_moe.models.dual_head import AuxiliaryHead, auxiliary_head, auxiliary_logits
from dist_moe.parallel import World, experts_of_rank, sum_over_ranks
from dist_moe.recipes.distillation import DHKDConfig, DistillationObjective, Teacher
from dist_moe.tasks.objective import WeightedObjective
from dist_moe.tasks.recommendation.task import RecommendationTask

DIM, EXPERTS, UNITS, CLASSES, BATCH = 5, 4, 6, 3, 24


@dataclass(frozen=True)
class Labelled:
    """Examples whose label is the largest of their first numbers."""

    x_BD: Tensor
    label_B: Tensor
    examples_in_step: int

    @property
    def inputs(self) -> tuple[Tensor]:
        return (self.x_BD,)

    @property
    def tokens_in_step(self) -> int:
        return self.examples_in_step


class Labels(RecommendationTask):
    """Cross-entropy of the main head, without a data set."""

    def __init__(self) -> None:
        pass

    def task_losses(self, output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        summed = F.cross_entropy(output.predictions[0], batch.label_B, reduction="sum")
        return {"ce": summed / batch.examples_in_step}


@dataclass(frozen=True)
class DualHeadOutput(ModelOutput):
    auxiliary_BC: Tensor | None = None


class DualHead(nn.Module):
    """A linear head beside an auxiliary one: (B, dim) -> both heads' (B, C) logits."""

    def __init__(self, dim: int, num_classes: int, auxiliary: AuxiliaryHead | None) -> None:
        super().__init__()
        self.main = nn.Linear(dim, num_classes)
        self.auxiliary = auxiliary_head(auxiliary, dim, num_classes)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.main(x_BD), auxiliary_logits(self.auxiliary, x_BD)


class Student(MoEModel):
    """A linear layer, dropout, experts behind a gate, two heads that start alike if both are linear."""

    def __init__(
        self,
        world: World,
        auxiliary: AuxiliaryHead | None = "linear",
        dropout: float = 0.0,
        gate: Callable[[], Gate] = lambda: TopK(UNITS, EXPERTS, 2, balance_weight=0.05),
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.below = nn.Linear(DIM, UNITS)
        self.dropout = nn.Dropout(dropout)
        self.gate = gate()
        self.gate.sum_over_ranks = sum_over_ranks
        bank = DenseReLUBank(UNITS, UNITS, EXPERTS, experts_of_rank(EXPERTS, world))
        self.moe = MoE(self.gate, bank, world=world)
        self.head = DualHead(UNITS, CLASSES, auxiliary)
        if isinstance(self.head.auxiliary, nn.Linear):
            self.head.auxiliary.load_state_dict(self.head.main.state_dict())

    def forward(self, x_BD: Tensor) -> DualHeadOutput:
        mixed = self.moe(self.dropout(self.below(x_BD)))
        logit_BC, auxiliary_BC = self.head(mixed.outputs[0])
        return DualHeadOutput((logit_BC,), (mixed,), auxiliary_BC)


class Oracle(nn.Module):
    """A teacher that knows the labels, or, with a negative ``confidence``, is sure of the others."""

    def __init__(self, confidence: float) -> None:
        super().__init__()
        self.confidence = nn.Parameter(torch.tensor(confidence))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.confidence * F.one_hot(x_BD[:, :CLASSES].argmax(dim=1), CLASSES)


def step_of_examples(step: int) -> Labelled:
    """All examples of a step."""
    x_BD = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step))
    return Labelled(x_BD, x_BD[:, :CLASSES].argmax(dim=1), BATCH)


def micro_batches(step: int, rank: int, ranks: int, accumulation: int) -> Iterator[Labelled]:
    whole, size = step_of_examples(step), BATCH // (ranks * accumulation)
    for micro in range(accumulation):
        rows = slice((micro * ranks + rank) * size, (micro * ranks + rank + 1) * size)
        yield Labelled(whole.x_BD[rows], whole.label_B[rows], BATCH)


def auxiliary_terms(config: DHKDConfig) -> Callable[[Any, Tensor, Labelled], dict[str, Tensor]]:
    """DHKD's loss of the auxiliary head."""

    def terms(output: DualHeadOutput, taught_BC: Tensor, batch: Labelled) -> dict[str, Tensor]:
        assert output.auxiliary_BC is not None
        return {"dhkd": config.loss(output.auxiliary_BC, taught_BC, batch.examples_in_step)}

    return terms


@contextmanager
def student_engine(
    groups: ProcessGroups, student: Student, optimizer: dict[str, Any], **section: Any
) -> Iterator[ExpertParallelEngine]:
    """Destroyed at the end."""
    world_size = groups.environment.world_size
    completed = complete_deepspeed_section({"optimizer": optimizer, **section}, BATCH, world_size)
    engine = ExpertParallelEngine(student, completed, groups)
    try:
        yield engine
    finally:
        engine.destroy()


def objective_of(
    engine: ExpertParallelEngine, teacher: nn.Module | None, config: DHKDConfig
) -> WeightedObjective | DistillationObjective:
    """The labels' loss, and the teacher's if there is one."""
    shares = engine.process_groups.environment.world_size * engine.gradient_accumulation_steps()
    plain = WeightedObjective(Labels(), (1.0,), shares)
    if teacher is None:
        return plain
    objective = DistillationObjective(plain, Teacher(teacher), auxiliary_terms(config), align=config.align_gradients)
    objective.on_start(cast(Trainer, SimpleNamespace(engine=engine)))
    return objective


def take_step(engine: ExpertParallelEngine, objective: Any, step: int) -> dict[str, Tensor]:
    """The numbers that the last micro-batch recorded on this rank."""
    engine.train()
    environment = engine.process_groups.environment
    torch.manual_seed(1000 * step + environment.rank)
    sums: dict[str, Tensor] = {}
    for batch in micro_batches(step, environment.rank, environment.world_size, engine.gradient_accumulation_steps()):
        result = objective(engine, batch)
        engine.backward(result.loss)
        engine.step()
        sums = result.sums
    return sums
