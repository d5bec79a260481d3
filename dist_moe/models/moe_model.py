"""What every model with one MoE layer has in common: its configuration, its layer, its output."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import Field
from torch import Tensor, nn

from dist_moe.experts import ExpertBank
from dist_moe.gates import CometConfig, GateConfig, GateContext
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import World, sum_over_ranks
from dist_moe.search import PermutationSearchConfig, SlotTable
from dist_moe.settings import Settings


@dataclass(frozen=True)
class ModelOutput:
    """``predictions``: one tensor per task, its axis 0 the batch. ``moe``: what the layer did."""

    predictions: tuple[Tensor, ...]
    moe: MoEOutput


@dataclass(frozen=True)
class RunShape:
    """What a model may need to know of the run: the ranks over which experts are split, its length in
    steps, and what its gates may need to know."""

    world: World
    steps_per_epoch: int
    gates: GateContext = field(default_factory=GateContext)


class MoEModelConfig(Settings):
    """The fields that every model has."""

    num_experts: int = Field(16, ge=2, description="experts in all, over all ranks")
    gate: GateConfig = Field(
        default_factory=lambda: CometConfig(), description="the gate; each task has one of its own"
    )
    permutation: PermutationSearchConfig | None = Field(
        None, description="permutation local search while training: the '+' of COMET+ (null: none)"
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep none of the dispatched rows and of the experts' activations for the backward pass: "
        "they are sent and computed again there",
    )

    def build_layer(self, experts: ExpertBank, num_gates: int, run: RunShape) -> MoE:
        """One gate per task over shared ``experts``, with a slot -> expert table or the search for one."""
        gates = [self.gate.build(experts.dim, self.num_experts, run.gates) for _ in range(num_gates)]
        for gate in gates:
            gate.sum_over_ranks = sum_over_ranks
        if self.permutation is not None:
            table: SlotTable = self.permutation.build(gates, run.steps_per_epoch)
        else:
            table = SlotTable(self.num_experts, num_gates)
        return MoE(gates, experts, table, run.world, recompute_experts=self.activation_checkpointing)


class MoEModel(nn.Module):
    """A model whose experts are in ``moe``."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    @property
    def table(self) -> SlotTable:
        """The slot -> expert table of the layer."""
        assert isinstance(self.moe.permutation, SlotTable)
        return self.moe.permutation
