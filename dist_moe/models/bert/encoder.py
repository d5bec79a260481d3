"""BERT's encoder on ragged rows: embeddings, attention, and a feed-forward block that is dense or of experts.

Devlin, Chang, Lee, Toutanova: BERT (NAACL 2019): learnt positions, LayerNorm after each residual, GELU. Weights are
drawn from N(0, 0.02), biases are zero, as there.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe import kernels
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.bert.ragged import Ragged
from dist_moe.models.bert.shape import BertShape

INIT_STD = 0.02


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
        query, key, value = (self._split(ragged.padded(part(x_TD))) for part in (self.query, self.key, self.value))
        mask = None if ragged.is_full else ragged.real_BS[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        mixed_TD = ragged.tokens_of(mixed.transpose(1, 2).flatten(2))
        return self.norm(x_TD + kernels.dropout(self.output(mixed_TD), self.dropout, self.training))

    def _split(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, heads, S, D / heads)."""
        return x_BSD.unflatten(2, (self.heads, x_BSD.shape[2] // self.heads)).transpose(1, 2)


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
        y_TD = self.down(self.activation(self.up(x_TD)))
        return self.norm(x_TD + kernels.dropout(y_TD, self.dropout, self.training)), None


class ExpertFeedForward(nn.Module):
    """A mixture of experts in its place: of whole blocks, or (``norm``) of networks within one residual and LayerNorm.

    ``token_T``: token ids, for gates that route by identity; None if they are not known.
    """

    def __init__(self, moe: MoE, norm: nn.LayerNorm | None, dropout: float) -> None:
        super().__init__()
        self.moe = moe
        self.norm = norm
        self.dropout = dropout

    def forward(self, x_TD: Tensor, token_T: Tensor | None) -> tuple[Tensor, MoEOutput | None]:
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
        result: tuple[Tensor, MoEOutput | None] = self.feed_forward(self.attention(x_TD, ragged), token_T)
        return result


class BertEncoder(nn.Module):
    """``encoder(token_T, segment_T, ragged, keep_all)`` -> (T, D) after the last layer, or (``keep_all``) after the
    embeddings and after every layer; and the MoE layers' outputs."""

    def __init__(self, shape: BertShape, feed_forwards: list[FeedForward], dropout: float) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(shape, dropout)
        self.layers = nn.ModuleList(BertLayer(shape, each, dropout) for each in feed_forwards)

    def forward(
        self, token_T: Tensor, segment_T: Tensor, ragged: Ragged, keep_all: bool
    ) -> tuple[list[Tensor], tuple[MoEOutput, ...]]:
        states = [self.embeddings(token_T, ragged.position_T, segment_T)]
        mixed: list[MoEOutput] = []
        for layer in self.layers:
            x_TD, output = layer(states[-1], token_T, ragged)
            states = [*states, x_TD] if keep_all else [x_TD]
            mixed += [] if output is None else [output]
        return states, tuple(mixed)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """As BERT begins: N(0, 0.02), no bias."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, std=INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=INIT_STD)
    return embedding
