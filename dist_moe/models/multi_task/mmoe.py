"""MMoE: experts that all targets share, and a gate for each target; Ma et al., KDD 2018.

h_t = sum_e g_t(x)_e E_e(x)        the paper's gate is a softmax; any other may choose instead
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny
from torch import Tensor

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.experts import EXPERTS, ExpertSettings, MlpConfig
from dist_moe.gates import GATES, GateSettings, SoftmaxConfig
from dist_moe.layer import MoE
from dist_moe.models.moe_model import ModelOutput, RunShape, check_experts
from dist_moe.models.multi_task.front import Front, MultiTaskConfig, TableFeatures, TableModel, routing_ids
from dist_moe.parallel import experts_of_rank


class MMoEConfig(MultiTaskConfig):
    """Shared experts, and a gate and a tower for each target."""

    name: Literal["mmoe"] = Field("mmoe", description="which model this is")
    num_experts: int = Field(8, ge=2, le=LARGEST_COUNT, description="experts of a layer, over all ranks")
    gate: Annotated[SerializeAsAny[GateSettings], GATES.with_default("softmax")] = Field(
        default_factory=lambda: SoftmaxConfig(), description="the gate; each task has one of its own"
    )
    experts: Annotated[SerializeAsAny[ExpertSettings], EXPERTS.with_default("mlp")] = Field(
        default_factory=lambda: MlpConfig(), description="the experts"
    )

    def build(self, features: TableFeatures, targets: tuple[str, ...], run: RunShape) -> MMoE:
        """Return the model with this rank's experts. Raises UserError if they cannot take the embedded rows."""
        front = Front(features, self.embedding_dim)
        check_experts(self.experts, front.width)
        expert_ids = experts_of_rank(self.num_experts, run.world)
        experts = self.experts.build(front.width, self.num_experts, expert_ids)
        return MMoE(front, self.build_layer(experts, len(targets), run), self.tower_units)


class MMoE(TableModel):
    """See :class:`MMoEConfig`."""

    def __init__(self, front: Front, moe: MoE, tower_units: tuple[int, ...]) -> None:
        super().__init__(front, moe.experts.out_dim, len(moe.gates), tower_units)
        self.moe = moe

    def forward(self, ids_BC: Tensor, numeric_BM: Tensor, lists_BP: Tensor) -> ModelOutput:
        """Return predictions of each target, and what the MoE layer did."""
        mixed = self.moe(self.front(ids_BC, numeric_BM, lists_BP), routing_ids(ids_BC))
        return ModelOutput(self.predictions(mixed.outputs), (mixed,))
