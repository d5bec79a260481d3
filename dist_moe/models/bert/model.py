"""A BERT whose feed-forward blocks are dense or of experts, but for its head: what classifiers and answerers share.

    output = model(token_BS, length_B, segment_BS, hidden_states=True)
    output.hidden_states         # (B, S, D) each: embeddings, then every layer; 0 where there is no token

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

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.experts import BertFeedForwardBank, ExpertBank, FeedForwardBank
from dist_moe.models.bert.encoder import (
    BertEncoder,
    DenseFeedForward,
    ExpertFeedForward,
    FeedForward,
)
from dist_moe.models.bert.ragged import Ragged
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.parallel import experts_of_rank

ABOVE = ("pooler.", "classifier.", "span.", "auxiliary.")
"""What may stand above the encoder, as parameters' names begin."""
AUXILIARY = ABOVE[-1]


class BertConfig(MoEModelConfig):
    """The encoder's part of a model's section."""

    one_layer: ClassVar[bool] = False

    num_experts: int = Field(4, ge=2, description="experts of a layer, over all ranks")
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
        None, ge=1, description="width of each expert's network (null: that of the dense one, divided by num_experts)"
    )
    hidden: int | None = Field(
        None, ge=1, description="width of the networks of dense layers (null: that of the checkpoint)"
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
        """At least so many: how many layers the encoder has, only its checkpoint says."""
        return 2 if self.moe_every else 0

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) of the encoder has experts."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0

    def fitted(self, shape: BertShape) -> BertShape:
        """``shape`` with the dense width of this configuration."""
        return replace(shape, hidden=self.hidden or shape.hidden)

    def width_of_experts(self, shape: BertShape) -> int:
        """Of each expert's network, for an encoder whose dense networks have ``shape.hidden``.

        Raises UserError if that cannot be divided among the experts.
        """
        if self.expert_hidden is None and shape.hidden % self.num_experts:
            raise UserError(
                f"model.num_experts={self.num_experts}: the feed-forward width {shape.hidden} cannot be divided among "
                "them; give model.expert_hidden"
            )
        return self.expert_hidden or shape.hidden // self.num_experts

    def feed_forwards(self, shape: BertShape, run: RunShape) -> list[FeedForward]:
        """The blocks of all layers, with this rank's experts and random weights.

        Raises UserError if ``moe_every`` leaves a model without the experts that it speaks of.
        """
        if self.moe_every > shape.layers:
            raise UserError(
                f"model.moe_every={self.moe_every}: the encoder has {shape.layers} layers; use 0 for a dense model"
            )
        return [self.feed_forward(shape, layer, run) for layer in range(shape.layers)]

    def feed_forward(self, shape: BertShape, layer: int, run: RunShape) -> FeedForward:
        """The block of layer ``layer`` alone."""
        if not self.has_experts(layer):
            return DenseFeedForward(self.fitted(shape), self.dropout)
        moe = self.build_layer(self._experts(shape, run), 1, run, layer=layer)
        norm = nn.LayerNorm(shape.width, eps=shape.norm_eps) if self.expert_form == "network" else None
        return ExpertFeedForward(moe, norm, self.dropout)

    def _experts(self, shape: BertShape, run: RunShape) -> ExpertBank:
        ids, width = experts_of_rank(self.num_experts, run.world), self.width_of_experts(shape)
        if self.expert_form == "network":
            return FeedForwardBank(shape.width, width, self.num_experts, ids, activation=shape.activation, bias=True)
        return BertFeedForwardBank(
            shape.width,
            width,
            self.num_experts,
            ids,
            activation=shape.activation,
            dropout=self.dropout,
            norm_eps=shape.norm_eps,
        )


@dataclass(frozen=True)
class BertOutput(ModelOutput):
    """``real_BS``: bool, where there are tokens.

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
        """From what the last layer gives, and the logits of an auxiliary head."""

    def forward(
        self, token_BS: Tensor, length_B: Tensor, segment_BS: Tensor | None = None, hidden_states: bool = False
    ) -> BertOutput:
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

    def place(self, weights: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> None:
        """Copy in weights by name, as :func:`place_weights` does; a pooler or head that ``weights`` lacks stays.

        What stands above the encoder of another kind of model is left out. Raises UserError naming what does not fit.
        """
        ours = {name for name, _ in self.named_parameters()}
        fitting = {name: value for name, value in weights.items() if name in ours or not name.startswith(ABOVE)}
        lacking = [part for part in ABOVE if not any(name.startswith(part) for name in fitting)]
        place_weights(self, fitting, (*fresh, *lacking))

    def dense_layers(self) -> dict[int, DenseFeedForward]:
        """The feed-forward blocks that are not of experts, by layer."""
        blocks = (layer.get_submodule("feed_forward") for layer in self.encoder.layers)
        return {i: block for i, block in enumerate(blocks) if isinstance(block, DenseFeedForward)}

    def num_parameters(self, experts_per_token: int | None = None) -> int:
        """All of the model's, over all ranks; or those that a token meets that goes to so many experts of a layer.

        The latter are MoEBERT's effective parameters, embeddings included; gates count in full.
        """
        banks = [layer.experts for layer in self.moe_layers.values()]
        of_banks = {id(parameter) for bank in banks for parameter in bank.parameters()}
        dense = sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in of_banks)
        return dense + sum(
            sum(parameter[0].numel() for parameter in bank.parameters()) * (experts_per_token or bank.num_experts)
            for bank in banks
        )
