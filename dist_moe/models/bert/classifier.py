"""A BERT classifier, dense or with experts: the teacher, its students, COMET-BERT.

config = BertClassifierConfig(num_experts=4, gate=CometConfig(k=1))      # moe_every=0: dense, the teacher
model = config.build(shape, num_labels, run)                             # shape: a BertShape
output = model(token_BS, length_B, segment_BS, hidden_states=True)
output.predictions[0]        # (B, num_labels) logits
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe import kernels
from dist_moe.models.bert.encoder import FeedForward, linear
from dist_moe.models.bert.model import BertConfig, BertModel
from dist_moe.models.bert.ragged import Ragged
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.dual_head import AuxiliaryHead, auxiliary_head, auxiliary_logits
from dist_moe.models.moe_model import RunShape


class BertClassifierConfig(BertConfig):
    """Classifier of texts, or of pairs of texts; with one label, a regression."""

    kind: ClassVar[str] = "text_classification"

    name: Literal["bert_classifier"] = Field("bert_classifier", description="which model this is")
    auxiliary_head: AuxiliaryHead | None = Field(
        None,
        description="second head for the teacher's logits, of recipe.name=dhkd: linear, or mlp with 200 hidden "
        "units; it is there while training alone (null: none)",
    )

    def build(self, shape: BertShape, num_labels: int, run: RunShape) -> BertClassifier:
        """Return the model with this rank's experts and random weights; all ranks must have seeded torch alike.

        Raises UserError if ``moe_every`` leaves a model without the experts that it speaks of.
        """
        blocks = self.feed_forwards(shape, run)
        return BertClassifier(self.fitted(shape), blocks, num_labels, self.dropout, self.auxiliary_head)


class BertClassifier(BertModel):
    """Its prediction: (B, num_labels) logits, of the pooled first token of each text.

    With an ``auxiliary`` head everything else is as without it, to the bit.
    """

    head = "classifier."

    def __init__(
        self,
        shape: BertShape,
        feed_forwards: list[FeedForward],
        num_labels: int,
        dropout: float,
        auxiliary: AuxiliaryHead | None = None,
    ) -> None:
        super().__init__(shape, feed_forwards, dropout)
        self.num_labels = num_labels
        self.pooler = linear(shape.width, shape.width)
        self.classifier = linear(shape.width, num_labels)
        self.auxiliary = auxiliary_head(auxiliary, shape.width, num_labels)

    def predictions_of(self, x_TD: Tensor, ragged: Ragged) -> tuple[tuple[Tensor, ...], Tensor | None]:
        pooled_BD = torch.tanh(self.pooler(x_TD.index_select(0, ragged.start_B)))
        feature_BD = kernels.dropout(pooled_BD, self.dropout, self.training)
        return (self.classifier(feature_BD),), auxiliary_logits(self.auxiliary, feature_BD)
