"""BERT's encoder on ragged rows: its sizes, embeddings, attention, and feed-forward blocks, dense or of experts.

Devlin, Chang, Lee, Toutanova: BERT (NAACL 2019): learnt positions, LayerNorm after each residual, GELU. Weights are
drawn from N(0, 0.02), biases are zero, as there.

Everything but attention works on single tokens. So the encoder keeps (T, D) rows of real tokens, one sequence after
another, and pads only for attention: no gate ever sees a token that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe import kernels
from dist_moe.errors import UserError, shown
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.hugging_face.files import field_errors

INIT_STD = 0.02

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Our names by transformers' names. "gelu" is the exact one; its approximations are other functions."""

_FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}


@dataclass(frozen=True)
class BertShape:
    """Sizes of an encoder. ``vocab``: token ids. ``width``: of a token. ``hidden``: of a feed-forward network.
    ``positions``: tokens that a sequence may have. ``segments``: sentences that an example may have. The defaults are
    BERT-base's.

    Raises UserError if ``width`` is no multiple of ``heads``, or for an unknown ``activation``.
    """

    vocab: int = 30_522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    segments: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"

    def __post_init__(self) -> None:
        fields = {theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()}
        for error in field_errors(fields, fields.keys() - {"layer_norm_eps"}, ("layer_norm_eps",)):
            raise UserError(f"the BERT encoder's configuration cannot be followed: {error}")
        if self.width % self.heads:
            raise UserError(f"hidden_size={self.width} is no multiple of num_attention_heads={self.heads}")
        if self.activation not in ACTIVATIONS.values():
            raise UserError(f"hidden_act={shown(self.activation)} is not known; allowed: {sorted(ACTIVATIONS)}")

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> BertShape:
        """Return the sizes that a ``config.json`` says; what it leaves out has transformers' default, which is ours.

        Raises UserError for a model that is no BERT encoder with learnt absolute positions.
        """
        wanted = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
        for field, value in wanted.items():
            if config.get(field, value) != value:
                raise UserError(
                    f"{field}={shown(config[field])}: only BERT encoders with {field}={value!r} can be read"
                )
        sizes = {ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config}
        activation = str(config.get("hidden_act", "gelu"))
        return cls(**sizes, activation=ACTIVATIONS.get(activation, activation))

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the fields of ``config.json``."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()}
        return {"model_type": "bert", "hidden_act": self.activation, **sizes}


@dataclass(frozen=True)
class Ragged:
    """Which of B x S places hold tokens.

    ``place_T``: (T,) int64, the places of the tokens among the B * S, rising. ``start_B``: the row of each
    sequence's first token. ``real_BS``: whether a place holds a token.
    """

    place_T: Tensor
    start_B: Tensor
    real_BS: Tensor

    @classmethod
    def of(cls, length_B: Tensor, limit: int) -> Ragged:
        """Return it for sequences of ``length_B`` tokens each, at the first of ``limit`` places. Waits for the device
        once: for T.

        Raises ValueError for a length that does not lie in 1..limit (on an accelerator an error without words).
        """
        fits_B = (length_B >= 1) & (length_B <= limit)
        if kernels.on_device_path(length_B):
            torch._assert_async(fits_B.all())
        elif not fits_B.all():
            raise ValueError(f"lengths must lie in 1..{limit}, got {length_B[~fits_B].tolist()}")
        return cls.where(torch.arange(limit, device=length_B.device) < length_B.unsqueeze(1))

    @classmethod
    def where(cls, real_BS: Tensor) -> Ragged:
        """Return it for tokens at any places. Waits for the device once: for T."""
        length_B = real_BS.sum(1)
        return cls(real_BS.flatten().nonzero().squeeze(1), length_B.cumsum(0) - length_B, real_BS)

    @property
    def is_full(self) -> bool:
        """Whether there is no padding at all."""
        return self.place_T.numel() == self.real_BS.numel()

    @property
    def example_T(self) -> Tensor:
        """(T,) int64: the sequence that each token belongs to."""
        return torch.div(self.place_T, max(self.real_BS.shape[1], 1), rounding_mode="floor")

    @property
    def position_T(self) -> Tensor:
        """(T,) int64: the position of each token in its sequence."""
        return self.place_T % max(self.real_BS.shape[1], 1)

    def tokens_of(self, x_BS: Tensor) -> Tensor:
        """Return the (T, ...) of (B, S, ...) that stand at the real places."""
        rows = x_BS.flatten(0, 1)
        return rows if self.is_full else rows.index_select(0, self.place_T)

    def padded(self, x_TD: Tensor) -> Tensor:
        """Return (T, D) rows as (B, S, D), 0 where there is no token."""
        if not self.is_full:
            zeros = x_TD.new_zeros(self.real_BS.numel(), x_TD.shape[1])
            x_TD = zeros.index_copy(0, self.place_T, x_TD)
        return x_TD.view(*self.real_BS.shape, x_TD.shape[1])


class BertEmbeddings(nn.Module):
    """Token + position + segment, then LayerNorm and dropout."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.token = _embedding(shape.vocab, shape.width)
        self.position = _embedding(shape.positions, shape.width)
        self.segment = _embedding(shape.segments, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = dropout

    def forward(self, token_T: Tensor, position_T: Tensor, segment_T: Tensor) -> Tensor:
        """Return (T, D) rows of (T,) ids."""
        x_TD = self.token(token_T) + self.segment(segment_T) + self.position(position_T)
        return kernels.dropout(self.norm(x_TD), self.dropout, self.training)


class BertAttention(nn.Module):
    """Attention of every token to all tokens of its sequence, with its residual and LayerNorm."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (linear(shape.width, shape.width) for _ in range(4))
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.heads = shape.heads
        self.dropout = dropout

    def forward(self, x_TD: Tensor, ragged: Ragged) -> Tensor:
        """Return (T, D) rows; padded on the way, and masked where there is padding."""
        parts = (ragged.padded(part(x_TD)) for part in (self.query, self.key, self.value))
        # (B, S, D) -> (B, heads, S, D / heads)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if ragged.is_full else ragged.real_BS[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        mixed_TD = ragged.tokens_of(mixed.transpose(1, 2).flatten(2))
        return self.norm(x_TD + kernels.dropout(self.output(mixed_TD), self.dropout, self.training))


class DenseFeedForward(nn.Module):
    """LN(x + dropout(down(act(up(x))))): (T, D) -> (T, D)."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.up = linear(shape.width, shape.hidden)
        self.down = linear(shape.hidden, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.activation = kernels.ACTIVATIONS[shape.activation].function
        self.dropout = dropout

    def forward(self, x_TD: Tensor, token_T: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """Return (T, D) rows, and None: there are no experts."""
        y_TD = self.down(self.activation(self.up(x_TD)))
        return self.norm(x_TD + kernels.dropout(y_TD, self.dropout, self.training)), None


class ExpertFeedForward(nn.Module):
    """A mixture of experts in place of a dense block: of whole blocks, or (``norm``) of networks within one residual
    and LayerNorm."""

    def __init__(self, moe: MoE, norm: nn.LayerNorm | None, dropout: float) -> None:
        super().__init__()
        self.moe = moe
        self.norm = norm
        self.dropout = dropout

    def forward(self, x_TD: Tensor, token_T: Tensor | None) -> tuple[Tensor, MoEOutput | None]:
        """Return (T, D) rows, and what the layer did; ``token_T``: ids, for gates that route by identity, if known."""
        mixed: MoEOutput = self.moe(x_TD, token_T)
        (y_TD,) = mixed.outputs
        if self.norm is None:
            return y_TD, mixed
        return self.norm(x_TD + kernels.dropout(y_TD, self.dropout, self.training)), mixed


FeedForward = DenseFeedForward | ExpertFeedForward


class BertLayer(nn.Module):
    """Attention, then the feed-forward block."""

    def __init__(self, shape: BertShape, feed_forward: FeedForward, dropout: float) -> None:
        super().__init__()
        self.attention = BertAttention(shape, dropout)
        self.feed_forward = feed_forward

    def forward(self, x_TD: Tensor, token_T: Tensor, ragged: Ragged) -> tuple[Tensor, MoEOutput | None]:
        """Return (T, D) rows, and what experts did, if there are any."""
        result: tuple[Tensor, MoEOutput | None] = self.feed_forward(self.attention(x_TD, ragged), token_T)
        return result


class BertEncoder(nn.Module):
    """Embeddings, then a layer for each feed-forward block."""

    def __init__(self, shape: BertShape, feed_forwards: list[FeedForward], dropout: float) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(shape, dropout)
        self.layers = nn.ModuleList(BertLayer(shape, each, dropout) for each in feed_forwards)

    def forward(
        self, token_T: Tensor, segment_T: Tensor, ragged: Ragged, keep_all: bool
    ) -> tuple[list[Tensor], tuple[MoEOutput, ...]]:
        """Return (T, D) rows after the last layer, or (``keep_all``) after the embeddings and after every layer; and
        the MoE layers' outputs."""
        states = [self.embeddings(token_T, ragged.position_T, segment_T)]
        mixed: list[MoEOutput] = []
        for layer in self.layers:
            x_TD, output = layer(states[-1], token_T, ragged)
            states = [*states, x_TD] if keep_all else [x_TD]
            mixed += [] if output is None else [output]
        return states, tuple(mixed)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Return a layer as BERT begins: weights from N(0, 0.02), biases zero."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, std=INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=INIT_STD)
    return embedding
