"""A decoder language model whose feed-forward layers may be mixtures of experts.

Pre-norm layers as in the Llama family: RMSNorm (Zhang and Sennrich, 2019), rotary positions, grouped-query
attention, SwiGLU; every m-th layer's feed-forward network is an MoE layer over SwiGLU experts, the others are
dense. Initialisers: normal, 0.02, divided by sqrt(2 layers) where results join the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from dist_moe.experts import FeedForwardBank
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.attention import CausalAttention
from dist_moe.models.dense import INIT_STD, SwiGLU, linear, residual_std
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.models.rotary import rotary_table
from dist_moe.models.transformer_size import TransformerSize
from dist_moe.parallel import experts_of_rank


class TransformerConfig(MoEModelConfig):
    """Decoder language model."""

    kind: ClassVar[str] = "language"
    one_layer: ClassVar[bool] = False

    name: Literal["transformer"] = Field("transformer", description="which model this is")
    num_experts: int = Field(8, ge=2, description="experts of a layer, over all ranks")
    layers: int = Field(4, ge=1, description="layers, each of attention and a feed-forward network")
    dim: int = Field(128, ge=2, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads, each of width dim / heads")
    kv_heads: int | None = Field(
        None, ge=1, description="key and value heads, each shared by heads / kv_heads heads (null: one for each head)"
    )
    moe_every: int = Field(
        2, ge=0, description="every so many layers, the last of them is a mixture of experts (0: none, a dense model)"
    )
    expert_hidden: int = Field(256, ge=1, description="hidden width of each expert")
    dense_hidden: int = Field(
        512, ge=1, description="hidden width of the layers that are no mixtures; k * expert_hidden costs as k experts"
    )
    shared_hidden: int | None = Field(
        None,
        ge=1,
        description="hidden width of a network beside the experts, for every token (null: none)",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary position embeddings' wavelengths")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    qk_norm: bool = Field(
        False, description="RMSNorm over all features of queries and of keys before heads are split, as OLMoE has it"
    )
    tied_embeddings: bool = Field(True, description="one matrix for the input embedding and the output layer")

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the model."""
        return self.layers // self.moe_every if self.moe_every else 0

    @property
    def width_of_keys(self) -> int:
        """Of all key heads together, which is that of all value heads."""
        return self.dim // self.heads * (self.kv_heads or self.heads)

    def validation_errors(self) -> Iterator[str]:
        """Yield whatever does not fit together, as "field=value: reason"."""
        yield from super().validation_errors()
        if self.dim % self.heads:
            yield f"heads={self.heads} does not divide dim={self.dim}"
        elif (self.dim // self.heads) % 2:
            yield f"heads={self.heads} leaves heads of width {self.dim // self.heads}; allowed: an even width"
        if self.heads % (self.kv_heads or self.heads):
            yield f"kv_heads={self.kv_heads} does not divide heads={self.heads}"
        if self.moe_every > self.layers:
            yield f"moe_every={self.moe_every} exceeds layers={self.layers}; allowed: 0 (dense) to {self.layers}"

    def build(self, vocab_size: int, run: RunShape) -> Transformer:
        return Transformer(self, vocab_size, run)

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is a mixture."""
        return bool(self.moe_every) and (layer + 1) % self.moe_every == 0

    def build_mixture(self, run: RunShape, layer: int) -> MoE:
        """The MoE layer of layer ``layer`` (from 0)."""
        out_std = residual_std(self.layers)
        experts = FeedForwardBank(
            self.dim,
            self.expert_hidden,
            self.num_experts,
            experts_of_rank(self.num_experts, run.world),
            activation="silu",
            gated=True,
            init_stds=(INIT_STD, out_std),
        )
        shared = SwiGLU(self.dim, self.shared_hidden, out_std) if self.shared_hidden else None
        return self.build_layer(experts, 1, run, layer=layer, shared=shared)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then the same with a feed-forward network: ``moe`` or ``dense``, one of them None."""

    def __init__(self, config: TransformerConfig, run: RunShape, layer: int) -> None:
        super().__init__()
        out_std, mixture = residual_std(config.layers), config.has_experts(layer)
        kv_heads = config.kv_heads or config.heads
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.attention = CausalAttention(config.dim, config.heads, kv_heads, out_std, qk_norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.dense = None if mixture else SwiGLU(config.dim, config.dense_hidden, out_std)
        self.moe = config.build_mixture(run, layer) if mixture else None

    def forward(self, x_BSD: Tensor, token_BS: Tensor, table_2SP: Tensor) -> tuple[Tensor, MoEOutput | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table_2SP)
        normed_BSD = self.feed_forward_norm(x_BSD)
        if self.moe is None:
            assert self.dense is not None
            return x_BSD + self.dense(normed_BSD), None
        mixed = self.moe(normed_BSD.flatten(0, 1), token_BS.flatten())
        return x_BSD + mixed.outputs[0].view_as(x_BSD), mixed


class Transformer(MoEModel):
    """``model(token_BS)``: int64 ids of B sequences of S tokens (B may be 0) -> (B, S, V) logits of the next tokens.

    Gates that route by identity see the token's id. ``size``: parameters and FLOPs.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, run: RunShape) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.layers = nn.ModuleList(DecoderLayer(config, run, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = linear(config.dim, vocab_size)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.size = TransformerSize.of(config, vocab_size, next(iter(self.moe_layers.values()), None))

    def forward(self, token_BS: Tensor) -> ModelOutput:
        x_BSD = self.embedding(token_BS)
        head_dim = self.config.dim // self.config.heads
        table_2SP = rotary_table(token_BS.shape[1], head_dim, self.config.rope_theta, x_BSD)
        mixtures: list[MoEOutput] = []
        for layer in self.layers:
            x_BSD, mixed = layer(x_BSD, token_BS, table_2SP)
            if mixed is not None:
                mixtures.append(mixed)
        return ModelOutput((self.head(self.norm(x_BSD)),), tuple(mixtures))
