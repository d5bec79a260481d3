"""Base of all models with MoE layers: configuration, layers, output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.registry import Registry
from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank, ExpertSettings, LowRankConfig
from dist_moe.gates import CometConfig, Gate, GateConfig, GateContext
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import World, added_over_ranks, sum_over_ranks
from dist_moe.search import PermutationSearchConfig, SlotTable
from dist_moe.search.layers import is_held, moe_layers, slot_tables


@dataclass(frozen=True)
class ModelOutput:
    """Output of a model. ``predictions``: one tensor per task, its axis 0 the batch. ``layers``: what each MoE layer
    did, in order."""

    predictions: tuple[Tensor, ...]
    layers: tuple[MoEOutput, ...]

    @property
    def aux(self) -> dict[str, Tensor]:
        """The auxiliary losses by name, summed over layers."""
        total: dict[str, Tensor] = {}
        for layer in self.layers:
            for name, loss in layer.aux.items():
                total[name] = total[name] + loss if name in total else loss
        return total


@dataclass(frozen=True)
class RunShape:
    """Facts of the run that a model may need: the ranks over which experts are split, its length in
    steps, and what its gates may need to know."""

    world: World
    steps_per_epoch: int
    gates: GateContext = field(default_factory=GateContext)


class MoEModelConfig(Settings, ABC):
    """The fields that every model has. ``kind``: tasks of the same kind fit. ``one_layer``: whether every
    example is one token, which meets one MoE layer; what plans and stacked training know. ``has_tables``: whether its
    layers have slot -> expert tables, which searches rewrite. ``gives_hidden_states``: whether the model takes
    ``hidden_states=True``, and its output has them then, see ``BertOutput``."""

    kind: ClassVar[str]
    one_layer: ClassVar[bool] = True
    has_tables: ClassVar[bool] = True
    gives_hidden_states: ClassVar[bool] = False

    name: str

    num_experts: int = Field(16, ge=2, le=LARGEST_COUNT, description="experts of a layer, over all ranks")
    num_slots: int | None = Field(
        None,
        ge=2,
        le=LARGEST_COUNT,
        description="slots that each gate chooses among; slot i leads to expert i mod num_experts until its slot map "
        "is changed, and slots of one expert add up their weights (null: as many as experts)",
    )
    slot_masks: bool = Field(
        False,
        description="gates have masks of the slots that they may choose, in the checkpoint, as pruning leaves them",
    )
    gate: GateConfig = Field(
        default_factory=lambda: CometConfig(), description="the gate; each task has one of its own"
    )
    permutation: PermutationSearchConfig | None = Field(
        None, description="permutation local search while training: the '+' of COMET+ (null: none)"
    )
    low_rank: LowRankConfig | None = Field(
        None,
        description="store the experts' matrices as a product of low rank plus a few rows, as dist-moe compress leaves "
        "them (null: whole)",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep none of the dispatched rows and of the experts' activations for the backward pass: "
        "they are sent and computed again there",
    )

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers."""
        return 1

    @property
    def slots_per_gate(self) -> int:
        """Number of slots that each gate chooses among."""
        return self.num_slots or self.num_experts

    @property
    def experts_per_token(self) -> int:
        """Experts that one gate gives a token, at most; once it is sparse, if it becomes so while it learns."""
        return min(self.gate.experts_per_token(self.slots_per_gate), self.num_experts)

    def expert_counts(self, targets: Sequence[str]) -> dict[str, int]:
        """Return the different numbers of experts of the layers, for a task with these targets, by what to call them.

        Each must be a multiple of the ranks over which experts are split. Raises UserError if the targets do not fit.
        """
        return {f"model.num_experts={self.num_experts}": self.num_experts}

    def validation_errors(self) -> Iterator[str]:
        """Yield whatever does not fit together, as "field=value: reason"."""
        if not self.has_tables:
            for field in ("num_slots", "permutation"):
                if getattr(self, field) is not None:
                    yield f"{field}: the gates of name={self.name} choose among experts, not slots; set it to null"
            if self.slot_masks:
                yield f"slot_masks: the gates of name={self.name} have masks of their own; set it to false"
            if self.low_rank is not None:
                yield f"low_rank: the experts of name={self.name} are stored whole; set it to null"
        rows = None if self.low_rank is None else self.low_rank.rows
        if rows is not None and len(rows) != self.num_moe_layers:
            yield f"low_rank.rows: has {len(rows)} entries; give one for each of {self.num_moe_layers} mixtures"
        if self.permutation is not None and self.slots_per_gate != self.num_experts:
            yield (
                f"num_slots={self.num_slots} is not num_experts={self.num_experts}, and only as many slots as experts "
                "can be permuted; set num_slots or permutation to null"
            )
        if self.activation_checkpointing and getattr(getattr(self, "experts", None), "batch_dependent", False):
            yield (
                "activation_checkpointing=true: experts with batch normalisation cannot be computed again; set it or "
                "experts.batch_norm to false"
            )

    def gate_errors(self) -> Iterator[str]:
        """Yield whatever of the gate does not fit the number of its slots, as "gate.field=value: reason"."""
        for error in self.gate.validation_errors(self.slots_per_gate):
            yield "gate." + (error if self.num_slots is None else error.replace("num_experts", "num_slots"))

    @abstractmethod
    def build(self, *inputs: Any, **named: Any) -> MoEModel:
        """Return the model with this rank's experts; all ranks must have seeded torch alike.

        ``inputs``: the sizes that tasks of its kind give by name (see ``Task.model_inputs``), and ``run``, a RunShape.
        """

    def build_layer(
        self,
        experts: ExpertBank,
        num_gates: int,
        run: RunShape,
        *,
        layer: int = 0,
        mixture: int = 0,
        shared: nn.Module | None = None,
    ) -> MoE:
        """Return the layer of one gate per task over the same ``experts``, with a slot map or the search for one.

        ``layer``: its number, from 0, where the model has several; ``mixture``: its number among those with experts.
        ``shared``: what every token goes through beside the experts. Raises UserError for experts that cannot be stored
        as ``low_rank`` says.
        """
        if self.low_rank is not None:
            experts.factor(self.low_rank.rank, self.low_rank.rows[mixture] if self.low_rank.rows else None)
        settings = self.gate.of_layer(layer)
        gates = [settings.build(experts.dim, self.slots_per_gate, run.gates) for _ in range(num_gates)]
        for gate in gates if self.slot_masks else ():
            gate.allow(torch.ones(gate.num_experts, dtype=torch.bool, device="cpu"))
        if self.permutation is not None:
            table: SlotTable = self.permutation.build(gates, run.steps_per_epoch)
        else:
            table = SlotTable(experts.num_experts, num_gates, num_slots=self.slots_per_gate)
        return self.layer_of(gates, experts, table, run, shared=shared)

    def layer_of(
        self,
        gates: Sequence[Gate],
        experts: ExpertBank,
        table: SlotTable | None,
        run: RunShape,
        shared: nn.Module | None = None,
    ) -> MoE:
        """Return the layer of these parts, whose statistics are those of all ranks."""
        for gate in gates:
            gate.sum_over_ranks = sum_over_ranks
        experts.add_over_ranks(added_over_ranks)
        return MoE(gates, experts, table, run.world, recompute_experts=self.activation_checkpointing, shared=shared)


def check_experts(experts: ExpertSettings, dim: int) -> None:
    """Raise UserError unless ``experts`` can take rows of width ``dim``, which only the data tell."""
    for error in experts.validation_errors(dim):
        raise UserError(f"model.{error}")


class MoEModel(nn.Module):
    """A model with MoE layers, which run in the order in which they were registered; a dense one has none."""

    @property
    def moe_layers(self) -> dict[str, MoE]:
        """The layers by their names in the model, in order."""
        return moe_layers(self)

    @property
    def tables(self) -> dict[str, SlotTable]:
        """The slot -> expert tables by their layers' names."""
        return slot_tables(self)

    @property
    def learning(self) -> bool:
        """Whether training still learns a table, one that is not held still."""
        return any(table.learning and not is_held(table) for table in self.tables.values())

    def activation_bytes(self, value_bytes: int, tokens: float, places: int) -> tuple[float, float]:
        """Return estimates in bytes per token, without MoE layers: kept for the backward pass, and what the backward
        pass of the largest part takes at once.

        ``value_bytes``: of an activation. ``tokens``: of an example, on average; ``places``: length of its padded row.
        By default the results of all linear layers are kept; override it where a model keeps much else.
        """
        widths = sum(module.out_features for module in self.modules() if isinstance(module, nn.Linear))
        return value_bytes * widths, 0.0

    def training_flops_per_token(self, sequence_length: int, experts_per_token: float) -> float | None:
        """Return the FLOPs of forward and backward pass, None where they are not known of this kind of model.

        ``experts_per_token``: on average over tokens and MoE layers.
        """
        return None

    def end_learning(self) -> None:
        """Keep the tables as they are from now on."""
        for table in self.tables.values():
            table.end_learning()

    def begin_step(self, step: int) -> None:
        """Tell gates and tables that training step ``step`` (from 0) begins. On every rank."""
        for layer in self.moe_layers.values():
            layer.begin_step(step)

    def end_step(self, *, skipped: bool) -> None:
        """Tell the gates that a training step has ended, or was skipped. On every rank."""
        for layer in self.moe_layers.values():
            layer.end_step(skipped=skipped)

    def begin_evaluation(self) -> None:
        """Tell the tables that an evaluation begins. On every rank."""
        for table in self.tables.values():
            table.begin_evaluation()


MODELS = Registry("model", MoEModelConfig)


def models_of_kind(kind: str) -> list[str]:
    """Return the names of the registered models that fit tasks of a kind, in the order of registration."""
    return [name for name, settings in MODELS.by_name.items() if settings.kind == kind]


ModelConfig = Annotated[SerializeAsAny[MoEModelConfig], MODELS]
"""The type of a configuration field that holds any registered model."""
