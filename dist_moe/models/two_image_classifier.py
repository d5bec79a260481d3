"""The COMET paper's classifier of two overlaid images (MultiMNIST, MultiFashionMNIST).

COMET supplement, section on architectures: convolutional experts, shared; per task a gate on the raw
pixels and a head dense 50 ReLU, dense 50 ReLU, dense 10. Initialisers are Keras' defaults, which the
authors used: glorot-uniform kernels, zero biases.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_COUNT, Size
from dist_moe.experts import EXPERTS, ConvConfig, ExpertSettings
from dist_moe.layer import MoE
from dist_moe.models.dense_layers import dense_layers
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape, check_experts
from dist_moe.parallel import experts_of_rank

NUM_IDS = 4096


class TwoImageClassifierConfig(MoEModelConfig):
    """Classifier of the two images that were added to one another, with a gate and a head for each."""

    kind: ClassVar[str] = "two_images"

    name: Literal["two_image_classifier"] = Field("two_image_classifier", description="which model this is")
    num_experts: int = Field(5, ge=2, le=LARGEST_COUNT, description="experts in all, over all ranks")
    experts: Annotated[SerializeAsAny[ExpertSettings], EXPERTS.with_default("conv")] = Field(
        default_factory=lambda: ConvConfig(), description="the experts"
    )
    head_units: tuple[Size, ...] = Field(
        (50, 50), description="units of the hidden layers of each task's head (empty: none)"
    )

    def build(self, side: int, num_classes: int, run: RunShape, num_targets: int = 2) -> TwoImageClassifier:
        """Return the model with this rank's experts; ``side``: pixels along each edge of the image, 36 in the paper.

        Raises UserError if the experts cannot take images of that size.
        """
        check_experts(self.experts, side**2)
        experts = self.experts.build(side**2, self.num_experts, experts_of_rank(self.num_experts, run.world))
        return TwoImageClassifier(self.build_layer(experts, num_targets, run), self.head_units, num_classes)


class TwoImageClassifier(MoEModel):
    """``model(image_BD)``: B flattened images (B may be 0) -> one (B, num_classes) tensor of logits per task.

    Images have no ids; gates that route by identity see :func:`pixel_ids`.
    """

    def __init__(self, moe: MoE, head_units: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.moe = moe
        self.heads = nn.ModuleList(dense_layers([moe.experts.out_dim, *head_units, num_classes]) for _ in moe.gates)

    def forward(self, image_BD: Tensor) -> ModelOutput:
        """Return logits of each target, and what the MoE layer did."""
        mixed = self.moe(image_BD, pixel_ids(image_BD))
        logits = tuple(head(output) for head, output in zip(self.heads, mixed.outputs, strict=True))
        return ModelOutput(logits, (mixed,))


def pixel_ids(image_BD: Tensor) -> Tensor:
    """Return (B,) int64 in 0..NUM_IDS-1: a hash of each image's 255 grey levels, the same wherever it occurs."""
    levels_BD = (image_BD.detach().float() * 255).round().long()
    factor_D = (2 * torch.arange(image_BD.shape[1], device=image_BD.device) + 1) * 2_654_435_761
    return ((levels_BD * factor_D).sum(dim=1) >> 16) % NUM_IDS
