"""A BERT that finds answers, dense or with experts: where in the text the answer to a question starts and ends.

model = BertAnswererConfig(num_experts=4, gate=CometConfig(k=1)).build(shape, run)
start_BS, end_BS = model(token_BS, length_B, segment_BS).predictions     # logits
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.models.bert.encoder import FeedForward, linear
from dist_moe.models.bert.model import BertConfig, BertModel
from dist_moe.models.bert.ragged import Ragged
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.moe_model import RunShape


class BertAnswererConfig(BertConfig):
    """Finder of answers within texts, as transformers' BertForQuestionAnswering is one."""

    kind: ClassVar[str] = "question_answering"

    name: Literal["bert_answerer"] = Field("bert_answerer", description="which model this is")

    def build(self, shape: BertShape, run: RunShape) -> BertAnswerer:
        """Return the model with this rank's experts and random weights; all ranks must have seeded torch alike."""
        return BertAnswerer(self.fitted(shape), self.feed_forwards(shape, run), self.dropout)


class BertAnswerer(BertModel):
    """Its predictions: (B, S) logits of the token at which the answer starts, and of its last one.

    Where there is no token they are the least number there is, so that their softmax is exactly 0.
    """

    head = "span."

    def __init__(self, shape: BertShape, feed_forwards: list[FeedForward], dropout: float) -> None:
        super().__init__(shape, feed_forwards, dropout)
        self.span = linear(shape.width, 2)

    def predictions_of(self, x_TD: Tensor, ragged: Ragged) -> tuple[tuple[Tensor, ...], Tensor | None]:
        logits_BS2 = ragged.padded(self.span(x_TD))
        least = torch.finfo(logits_BS2.dtype).min
        return logits_BS2.masked_fill(~ragged.real_BS.unsqueeze(2), least).unbind(2), None
