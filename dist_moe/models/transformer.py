"""A decoder language model whose feed-forward layers may be mixtures of experts.

Pre-norm layers as in the Llama family: RMSNorm (Zhang and Sennrich, 2019), rotary positions, grouped-query
attention, SwiGLU; every m-th layer's feed-forward network is an MoE layer over SwiGLU experts, the others are
dense. Initialisers: normal, 0.02, divided by sqrt(2 layers) where results join the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.experts import EXPERTS, ExpertSettings, FeedForwardConfig
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.attention import CausalAttention, rotary_table
from dist_moe.models.dense import INIT_STD, SwiGLU, linear, residual_std
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.parallel import experts_of_rank

_FP32, _INT64 = torch.float32.itemsize, torch.int64.itemsize


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
    experts: Annotated[SerializeAsAny[ExpertSettings], EXPERTS.with_default("feed_forward")] = Field(
        default_factory=lambda: FeedForwardConfig(), description="the experts"
    )
    dense_hidden: int = Field(
        512, ge=1, description="hidden width of the layers that are no mixtures; k * experts.hidden costs as k experts"
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
        """Yield what does not fit together, as "field=value: reason"."""
        yield from super().validation_errors()
        if self.dim % self.heads:
            yield f"heads={self.heads} does not divide dim={self.dim}"
        elif (self.dim // self.heads) % 2:
            yield f"heads={self.heads} leaves heads of width {self.dim // self.heads}; allowed: an even width"
        if self.heads % (self.kv_heads or self.heads):
            yield f"kv_heads={self.kv_heads} does not divide heads={self.heads}"
        if self.moe_every > self.layers:
            yield f"moe_every={self.moe_every} exceeds layers={self.layers}; allowed: 0 (dense) to {self.layers}"
        if self.moe_every:
            yield from self.experts.validation_errors(self.dim, self.dim)

    def expert_mismatches(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield (field, value, value to set) of the experts, where they are not the SwiGLU networks of dense layers."""
        if not isinstance(self.experts, FeedForwardConfig):
            yield "name", self.experts.name, "feed_forward"
            return
        for field, wanted in {"activation": "silu", "gated": True, "bias": False}.items():
            if getattr(self.experts, field) != wanted:
                yield field, getattr(self.experts, field), wanted

    def build(self, vocab_size: int, run: RunShape) -> Transformer:
        """Return the model with this rank's experts, over tokens 0..vocab_size - 1."""
        return Transformer(self, vocab_size, run)

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is a mixture."""
        return bool(self.moe_every) and (layer + 1) % self.moe_every == 0

    def build_mixture(self, run: RunShape, layer: int) -> MoE:
        """Return the MoE layer of layer ``layer`` (from 0). Raises UserError if its results have not width ``dim``."""
        out_std, expert_ids = residual_std(self.layers), experts_of_rank(self.num_experts, run.world)
        experts = self.experts.build(self.dim, self.num_experts, expert_ids, init_stds=(INIT_STD, out_std))
        if experts.out_dim != self.dim:
            raise UserError(
                f"model.experts.name={self.experts.name}: gives rows of width {experts.out_dim}, the model "
                f"needs model.dim={self.dim}; use feed_forward"
            )
        shared = SwiGLU(self.dim, self.shared_hidden, out_std) if self.shared_hidden else None
        return self.build_layer(experts, 1, run, layer=layer, shared=shared)


@dataclass(frozen=True)
class TransformerSize:
    """How large a transformer is, and what a token costs, wherever its experts live: formulas, tested against counts.

    ``routing``: parameters of a layer's gate and of its slot map. ``gate_products``: multiplications of a
    gate with a token, by which it chooses; an upper bound for a gate that finds its way without the dense products
    (COMET's lazy one). ``expert``: parameters of an expert. ``expert_flops``: of an expert and row, forward.
    """

    config: TransformerConfig
    vocab_size: int
    routing: int = 0
    gate_products: int = 0
    expert: int = 0
    expert_flops: float = 0.0

    @classmethod
    def of(cls, config: TransformerConfig, vocab_size: int, layer: MoE | None) -> TransformerSize:
        """Return the size of a model; ``layer``: any of its MoE layers, not yet sharded, None if it has none."""
        if layer is None:
            return cls(config, vocab_size)
        modules = [layer.gates, *([layer.slot_map] if isinstance(layer.slot_map, nn.Module) else [])]
        routing = sum(parameter.numel() for module in modules for parameter in module.parameters())
        tensors = [*layer.gates.parameters(), *layer.gates.buffers()]
        products = sum(t.numel() for t in tensors if t.dim() > 1 and t.shape[-1] == config.dim)
        bank = layer.experts
        return cls(config, vocab_size, routing, products, bank.parameters_per_expert, bank.flops_per_row)

    def num_params(self) -> int:
        """Return the number of all parameters, those of all experts included; a tied embedding counts once."""
        return self.active_params(self.config.num_experts)

    def active_params(self, experts_per_token: float) -> int:
        """Return the number of parameters met by a token that goes to so many experts in each MoE layer."""
        config = self.config
        mixture = experts_per_token * self.expert + self._shared() + self.routing
        tables = self.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
        norms = (2 * config.layers + 1) * config.dim
        norms += config.layers * (config.dim + config.width_of_keys) if config.qk_norm else 0
        return round(tables + norms + self._dense_weights() + config.num_moe_layers * mixture)

    def flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Return the FLOPs of the forward pass, a multiplication and an addition counting as two.

        Matrix products only; attention counts all pairs of positions, as torch's flop counter does, though
        half of them are masked. ``experts_per_token``: as measured, on average over tokens and MoE layers.
        """
        config = self.config
        scores = 2 * config.layers * sequence_length * config.dim  # with keys, then with values
        mixture = experts_per_token * self.expert_flops / 2 + self._shared() + self.gate_products
        mixtures = config.num_moe_layers * mixture
        return 2.0 * (self._dense_weights() + scores + mixtures + self.vocab_size * config.dim)

    def training_flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Return the FLOPs of forward and backward pass, the latter being twice the former."""
        return 3 * self.flops_per_token(sequence_length, experts_per_token)

    def _dense_weights(self) -> int:
        """Number of weights in matrices that every token meets, without embedding, head and MoE layers."""
        config = self.config
        attention = 2 * config.dim * (config.dim + config.width_of_keys)
        dense = 3 * config.dim * config.dense_hidden
        return config.layers * attention + (config.layers - config.num_moe_layers) * dense

    def _shared(self) -> int:
        return 3 * self.config.dim * (self.config.shared_hidden or 0)


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

    Gates that route by identity see the token's id. ``size``: parameters and FLOPs of the whole model.
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

    def activation_bytes(self, value_bytes: int, tokens: float, places: int) -> tuple[float, float]:
        """Return what autograd keeps of each operation on a CPU, without scores, as torch's fused attention has it;
        and the fp32 logits with their gradient."""
        config, vocabulary = self.config, self.embedding.num_embeddings
        attention = 9 * config.dim + 2 * config.width_of_keys + config.heads + 2  # with both norms before and after it
        attention += 2 * (config.dim + config.width_of_keys + 1) if config.qk_norm else 0
        dense = 4 * config.dense_hidden * (config.layers - config.num_moe_layers)
        shared = 4 * (config.shared_hidden or 0) * config.num_moe_layers
        kept = config.layers * attention + dense + shared + 3 * config.dim
        logits = vocabulary * (0 if value_bytes == _FP32 else value_bytes)  # beside those that are made fp32
        return value_bytes * kept + _FP32 * vocabulary + 3 * _INT64, 2 * _FP32 * vocabulary + logits

    def training_flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Return the FLOPs of forward and backward pass: see :class:`TransformerSize`."""
        return self.size.training_flops_per_token(sequence_length, experts_per_token)
