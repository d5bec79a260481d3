"""BERTs whose feed-forward blocks are dense or of experts: classifiers and finders of answers.

    config = BertClassifierConfig(num_experts=4, gate=CometConfig(k=1))      # moe_every=0: dense, the teacher
    model = config.build(shape, num_labels, run)                             # shape: a BertShape
    output = model(token_BS, length_B, segment_BS, hidden_states=True)
    output.predictions[0]        # (B, num_labels) logits
    output.hidden_states         # (B, S, D) each: embeddings, then every layer; 0 where there is no token
    start_BS, end_BS = BertAnswererConfig(num_experts=4).build(shape, run)(token_BS, length_B, segment_BS).predictions

Only real tokens are embedded, routed and computed; attention alone is padded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import LARGEST_COUNT, LARGEST_SIZE
from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.experts import BertFeedForwardBank, ExpertBank, FeedForwardBank
from dist_moe.models.bert.encoder import (
    BertEncoder,
    BertShape,
    DenseFeedForward,
    ExpertFeedForward,
    FeedForward,
    Ragged,
    linear,
)
from dist_moe.models.dual_head import AuxiliaryHead, auxiliary_head, auxiliary_logits
from dist_moe.models.layered import LayeredConfig
from dist_moe.models.moe_model import ModelOutput, MoEModel, RunShape
from dist_moe.parallel import experts_of_rank

ABOVE = ("pooler.", "classifier.", "span.", "auxiliary.")
"""Beginnings of the parameters' names of all parts that may stand above the encoder."""
AUXILIARY = ABOVE[-1]


class BertConfig(LayeredConfig):
    """The encoder's part of a model's section.

    Experts are described by fields of its own, not by ``experts: {name: ...}``: their activation, epsilon and, by
    default, width are those of the checkpoint, and their form decides where the residual and the LayerNorm are.
    """

    gives_hidden_states: ClassVar[bool] = True

    num_experts: int = Field(4, ge=2, le=LARGEST_COUNT, description="experts of a layer, over all ranks")
    moe_every: int = Field(
        1,
        ge=0,
        description="every how-many-th layer has experts (1: all, 2: the 2nd, 4th, ...; 0: none, a dense model)",
    )
    expert_form: Literal["block", "network"] = Field(
        "block",
        description="block: feed-forward network, residual and LayerNorm in each expert, as in MoEBERT; network: the "
        "network alone, within one residual and LayerNorm for all",
    )
    expert_hidden: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SIZE,
        description="width of each expert's network (null: that of the dense one, divided by num_experts)",
    )
    hidden: int | None = Field(
        None, ge=1, le=LARGEST_SIZE, description="width of the networks of dense layers (null: that of the checkpoint)"
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout on embeddings, attention, what each block adds to its residual, and a classifier's pooled "
        "token",
    )

    @model_validator(mode="after")
    def _no_token_without_expert(self) -> Self:
        null_slots = getattr(self.gate, "null_slots", 0)
        if self.moe_every and self.expert_form == "block" and null_slots:
            raise ValueError(
                f"gate.null_slots={null_slots}: a token without experts would have no residual with "
                "expert_form=block; use expert_form=network"
            )
        return self

    @property
    def num_moe_layers(self) -> int:
        """A lower bound of the number of MoE layers: how many layers the encoder has, only its checkpoint says."""
        return len(self.experts_by_layer or (0, 0)) if self.moe_every else 0

    def fitted(self, shape: BertShape) -> BertShape:
        """Return ``shape`` with the dense width of this configuration."""
        return replace(shape, hidden=self.hidden or shape.hidden)

    def width_of_experts(self, shape: BertShape) -> int:
        """Return the width of each expert's network, for an encoder whose dense networks have ``shape.hidden``.

        Raises UserError if that cannot be divided among the experts.
        """
        if self.expert_hidden is None and shape.hidden % self.num_experts:
            raise UserError(
                f"model.num_experts={self.num_experts}: the feed-forward width {shape.hidden} cannot be divided among "
                "them; give model.expert_hidden"
            )
        return self.expert_hidden or shape.hidden // self.num_experts

    def feed_forwards(self, shape: BertShape, run: RunShape) -> list[FeedForward]:
        """Return the blocks of all layers, with this rank's experts and random weights.

        Raises UserError if ``moe_every`` leaves a model without the experts that it speaks of.
        """
        for error in self.layer_errors(shape.layers):
            raise UserError(f"model.{error} (layers of the encoder)")
        return [self.feed_forward(shape, layer, run) for layer in range(shape.layers)]

    def feed_forward(self, shape: BertShape, layer: int, run: RunShape) -> FeedForward:
        """Return the block of layer ``layer`` alone."""
        if not self.has_experts(layer):
            return DenseFeedForward(self.fitted(shape), self.dropout)
        count = self.experts_of(layer)
        where = (shape.width, self.width_of_experts(shape), count, experts_of_rank(count, run.world))
        form, activation, norm_eps = self.expert_form, shape.activation, shape.norm_eps
        experts: ExpertBank
        if form == "network":
            experts = FeedForwardBank(*where, activation=activation, bias=True)
        else:
            experts = BertFeedForwardBank(*where, activation=activation, dropout=self.dropout, norm_eps=norm_eps)
        moe = self.build_layer(experts, 1, run, layer=layer, mixture=layer // self.moe_every)
        norm = nn.LayerNorm(shape.width, eps=norm_eps) if form == "network" else None
        return ExpertFeedForward(moe, norm, self.dropout)


@dataclass(frozen=True)
class BertOutput(ModelOutput):
    """Output of a BERT. ``real_BS``: bool, where there are tokens.

    ``hidden_states``: if asked for, the embeddings and what each layer gives, (B, S, D) each, 0 at padding.
    ``auxiliary_BC``: logits of a head that there is only while training (see :mod:`dist_moe.models.dual_head`).
    """

    real_BS: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    auxiliary_BC: Tensor | None = None


class BertModel(MoEModel):
    """``model(token_BS, length_B, segment_BS=None, hidden_states=False)``: B texts (B may be 0), padded with any id.

    ``token_BS``: int64 ids. ``length_B``: int64, the real tokens of each; 1..S.
    ``segment_BS``: which sentence a token is of, 0 if not given. Gates that route by identity see token ids.
    Raises ValueError for sequences longer than the encoder has positions.
    """

    head: ClassVar[str]
    """How the names of those parameters begin that a pre-trained encoder does not bring."""

    def __init__(self, shape: BertShape, feed_forwards: list[FeedForward], dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.encoder = BertEncoder(shape, feed_forwards, dropout)

    @abstractmethod
    def predictions_of(self, x_TD: Tensor, ragged: Ragged) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return predictions from what the last layer gives, and the logits of an auxiliary head."""

    def forward(
        self, token_BS: Tensor, length_B: Tensor, segment_BS: Tensor | None = None, hidden_states: bool = False
    ) -> BertOutput:
        """Return predictions, and (``hidden_states``) what each layer gives."""
        if token_BS.shape[1] > self.shape.positions:
            raise ValueError(
                f"sequences of {token_BS.shape[1]} tokens do not fit the encoder's {self.shape.positions} positions"
            )
        ragged = Ragged.of(length_B, token_BS.shape[1])
        token_T = ragged.tokens_of(token_BS)
        segment_T = torch.zeros_like(token_T) if segment_BS is None else ragged.tokens_of(segment_BS)
        states, layers = self.encoder(token_T, segment_T, ragged, hidden_states)
        kept = tuple(ragged.padded(x_TD) for x_TD in states) if hidden_states else ()
        predictions, auxiliary_BC = self.predictions_of(states[-1], ragged)
        return BertOutput(predictions, layers, ragged.real_BS, kept, auxiliary_BC)

    def activation_bytes(self, value_bytes: int, tokens: float, places: int) -> tuple[float, float]:
        """Return what autograd keeps of each operation on a CPU: attention keeps places, everything else tokens, and
        scores are kept where there is dropout on them; the loss takes hardly anything."""
        sizes, masks = self.shape, 1 if self.dropout else 0
        scores = 3 * sizes.heads * places
        attention = 3 * sizes.width + scores if self.dropout else 4 * sizes.width + sizes.heads
        output = (3 + masks) * sizes.width + 2  # what goes into the output layer, its residual and its norm
        kept = sizes.layers * (places / tokens * attention + output + sizes.width) + (2 + masks) * sizes.width
        for layer in self.encoder.layers:
            block = layer.get_submodule("feed_forward")
            kept += 2 * sizes.hidden if isinstance(block, DenseFeedForward) else 0
            kept += (1 + masks) * sizes.width + 2 if block.norm is not None else 0
        return value_bytes * kept + 3 * torch.int64.itemsize, value_bytes * 4 * sizes.width

    def place(self, weights: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> None:
        """Copy in weights by name, as :func:`place_weights` does; a pooler or head that ``weights`` lacks stays.

        What stands above the encoder of another kind of model is left out. Raises UserError naming what does not fit.
        """
        ours = {name for name, _ in self.named_parameters()}
        fitting = {name: value for name, value in weights.items() if name in ours or not name.startswith(ABOVE)}
        lacking = [part for part in ABOVE if not any(name.startswith(part) for name in fitting)]
        place_weights(self, fitting, (*fresh, *lacking))

    def dense_layers(self) -> dict[int, DenseFeedForward]:
        """Return the feed-forward blocks that are not of experts, by layer."""
        blocks = (layer.get_submodule("feed_forward") for layer in self.encoder.layers)
        return {i: block for i, block in enumerate(blocks) if isinstance(block, DenseFeedForward)}

    def num_parameters(self, experts_per_token: int | None = None) -> int:
        """Return the number of all parameters, over all ranks; or those met by a token that goes to so many experts.

        The latter are MoEBERT's effective parameters, embeddings included; gates count in full.
        """
        banks = [layer.experts for layer in self.moe_layers.values()]
        of_banks = {id(parameter) for bank in banks for parameter in bank.parameters()}
        dense = sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in of_banks)
        return dense + sum(bank.parameters_per_expert * (experts_per_token or bank.num_experts) for bank in banks)


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
    """A BERT whose prediction is (B, num_labels) logits, of the pooled first token of each text.

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
        """Return the (B, num_labels) logits, and those of the auxiliary head while it trains."""
        pooled_BD = torch.tanh(self.pooler(x_TD.index_select(0, ragged.start_B)))
        feature_BD = kernels.dropout(pooled_BD, self.dropout, self.training)
        return (self.classifier(feature_BD),), auxiliary_logits(self.auxiliary, feature_BD)


class BertAnswererConfig(BertConfig):
    """Finder of answers within texts, as transformers' BertForQuestionAnswering is one."""

    kind: ClassVar[str] = "question_answering"

    name: Literal["bert_answerer"] = Field("bert_answerer", description="which model this is")

    def build(self, shape: BertShape, run: RunShape) -> BertAnswerer:
        """Return the model with this rank's experts and random weights; all ranks must have seeded torch alike."""
        return BertAnswerer(self.fitted(shape), self.feed_forwards(shape, run), self.dropout)


class BertAnswerer(BertModel):
    """A BERT whose predictions are (B, S) logits of the token at which the answer starts, and of its last one.

    Where there is no token they are the least number there is, so that their softmax is exactly 0.
    """

    head = "span."

    def __init__(self, shape: BertShape, feed_forwards: list[FeedForward], dropout: float) -> None:
        super().__init__(shape, feed_forwards, dropout)
        self.span = linear(shape.width, 2)

    def predictions_of(self, x_TD: Tensor, ragged: Ragged) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the logits of first and of last tokens; there is no auxiliary head."""
        logits_BS2 = ragged.padded(self.span(x_TD))
        least = torch.finfo(logits_BS2.dtype).min
        return logits_BS2.masked_fill(~ragged.real_BS.unsqueeze(2), least).unbind(2), None
