"""A decoder language model whose feed-forward layers may be mixtures of experts.

Pre-norm layers as in the Llama family: RMSNorm (Zhang and Sennrich, 2019), rotary positions, grouped-query attention,
SwiGLU (Shazeer, 2020); every m-th layer's feed-forward network is an MoE layer over SwiGLU experts, the others are
dense. Initialisers: normal, 0.02, divided by sqrt(2 layers) where results join the residual stream (Radford et al.,
GPT-2, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe.config.settings import LARGEST_COUNT, LARGEST_DEPTH, LARGEST_SIZE
from dist_moe.errors import UserError
from dist_moe.experts import EXPERTS, ExpertSettings, FeedForwardConfig
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.attention import INIT_STD, CausalAttention, QKNorm, linear, rotary_table
from dist_moe.models.layered import LayeredConfig
from dist_moe.models.moe_model import ModelOutput, MoEModel, RunShape
from dist_moe.parallel import experts_of_rank

_FP32, _INT64 = torch.float32.itemsize, torch.int64.itemsize


class TransformerConfig(LayeredConfig):
    """Decoder language model."""

    kind: ClassVar[str] = "language"
    gives_hidden_states: ClassVar[bool] = True

    name: Literal["transformer"] = Field("transformer", description="which model this is")
    num_experts: int = Field(8, ge=2, le=LARGEST_COUNT, description="experts of a layer, over all ranks")
    layers: int = Field(4, ge=1, le=LARGEST_DEPTH, description="layers, each of attention and a feed-forward network")
    dim: int = Field(128, ge=2, le=LARGEST_SIZE, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads")
    head_dim: int | None = Field(
        None, ge=2, le=LARGEST_SIZE, description="width of each attention head, even (null: dim / heads)"
    )
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
        512,
        ge=1,
        le=LARGEST_SIZE,
        description="hidden width of the layers that are no mixtures; k * experts.hidden costs as k experts",
    )
    shared_hidden: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SIZE,
        description="hidden width of a network beside the experts, for every token (null: none)",
    )
    shared_gate: bool = Field(
        False, description="weigh that network by the sigmoid of a learnt projection of the token, as Qwen2-MoE has it"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary position embeddings' wavelengths")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    qk_norm: QKNorm = Field(
        "none",
        description="RMSNorm of queries and of keys: over all features before heads are split, as OLMoE has it (all), "
        "or over those of each head, with one weight for all heads, as Qwen3 has it (head)",
    )
    qkv_bias: bool = Field(False, description="learnt biases of queries, keys and values, as Qwen2 has them")
    tied_embeddings: bool = Field(True, description="one matrix for the input embedding and the output layer")

    @property
    def num_moe_layers(self) -> int:
        """Number of layers that are mixtures."""
        return self.layers // self.moe_every if self.moe_every else 0

    @property
    def residual_std(self) -> float:
        """Deviation of first weights whose results are added to the residual stream, twice per layer."""
        return INIT_STD / (2 * self.layers) ** 0.5

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def width_of_queries(self) -> int:
        """Width of all attention heads together."""
        return self.head_width * self.heads

    @property
    def width_of_keys(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.head_width * (self.kv_heads or self.heads)

    def validation_errors(self) -> Iterator[str]:
        """Yield what does not fit together, as "field=value: reason"."""
        yield from super().validation_errors()
        if self.head_dim is not None and self.head_dim % 2:
            yield f"head_dim={self.head_dim}; allowed: an even width"
        elif self.head_dim is None and self.dim % self.heads:
            yield f"heads={self.heads} does not divide dim={self.dim}"
        elif self.head_width % 2:
            yield f"heads={self.heads} leaves heads of width {self.head_width}; allowed: an even width"
        if self.heads % (self.kv_heads or self.heads):
            yield f"kv_heads={self.kv_heads} does not divide heads={self.heads}"
        if self.shared_gate and self.shared_hidden is None:
            yield "shared_gate=true weighs a shared network, and there is none; set shared_hidden"
        yield from self.layer_errors(self.layers)
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

    def build_mixture(self, run: RunShape, layer: int) -> MoE:
        """Return the MoE layer of layer ``layer`` (from 0). Raises UserError if its results have not width ``dim``."""
        count, stds = self.experts_of(layer), (INIT_STD, self.residual_std)
        experts = self.experts.build(self.dim, count, experts_of_rank(count, run.world), init_stds=stds)
        if experts.out_dim != self.dim:
            raise UserError(
                f"model.experts.name={self.experts.name}: gives rows of width {experts.out_dim}, the model "
                f"needs model.dim={self.dim}; use feed_forward"
            )
        network = GatedSwiGLU if self.shared_gate else SwiGLU
        shared = network(self.dim, self.shared_hidden, self.residual_std) if self.shared_hidden else None
        return self.build_layer(experts, 1, run, layer=layer, mixture=layer // self.moe_every, shared=shared)


@dataclass(frozen=True)
class TransformerSize:
    """Parameters and FLOPs of a model and of a token, counted when the model is built, wherever its experts live.

    ``others``: all parameters but the experts'. ``experts``: those of all experts. ``expert``: those of an expert in
    each MoE layer, together.
    ``expert_flops``: of such experts and a row each, forward. ``products``: multiplications with matrices that every
    token meets; an upper bound for a gate that finds its way without the dense products (COMET's lazy one).
    """

    config: TransformerConfig
    others: int
    experts: int
    expert: int
    expert_flops: float
    products: int

    @classmethod
    def of(cls, model: Transformer) -> TransformerSize:
        """Return the size of a model that is not yet sharded."""
        config, layers = model.config, list(model.moe_layers.values())
        banks = [layer.experts for layer in layers]
        of_experts = {id(parameter) for bank in banks for parameter in bank.parameters()}
        others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in of_experts)
        of_gates = [t for layer in layers for t in (*layer.gates.parameters(), *layer.gates.buffers())]
        products = sum(t.numel() for t in of_gates if t.dim() > 1 and t.shape[-1] == config.dim)
        inside = {id(module) for layer in layers for part in (layer.gates, layer.experts) for module in part.modules()}
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
        products += sum(linear.weight.numel() for linear in linears)
        experts = sum(bank.parameters_per_expert * bank.num_experts for bank in banks)
        expert = sum(bank.parameters_per_expert for bank in banks)
        return cls(config, others, experts, expert, sum(bank.flops_per_row for bank in banks), products)

    def num_params(self) -> int:
        """Return the number of all parameters, those of all experts included; a tied embedding counts once."""
        return self.others + self.experts

    def active_params(self, experts_per_token: float) -> int:
        """Return the number of parameters met by a token that goes to so many experts in each MoE layer."""
        return round(self.others + experts_per_token * self.expert)

    def flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Return the FLOPs of the forward pass, a multiplication and an addition counting as two.

        Matrix products only; attention counts all pairs of positions, as torch's flop counter does, though
        half of them are masked. ``experts_per_token``: as measured, on average over tokens and MoE layers.
        """
        # with keys, then with values
        scores = 2 * self.config.layers * sequence_length * self.config.width_of_queries
        return 2.0 * (self.products + scores) + experts_per_token * self.expert_flops


class SwiGLU(nn.Module):
    """y = (silu(x W) * (x U)) V, for every token alike."""

    def __init__(self, dim: int, hidden: int, out_std: float = INIT_STD) -> None:
        super().__init__()
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) results of (..., D) rows."""
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class GatedSwiGLU(SwiGLU):
    """sigmoid(x v) y(x): SwiGLU, weighed by how much a token has use for it (Qwen2-MoE's shared expert)."""

    def __init__(self, dim: int, hidden: int, out_std: float = INIT_STD) -> None:
        super().__init__(dim, hidden, out_std)
        self.share = linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) results of (..., D) rows."""
        return self.share(x).sigmoid() * super().forward(x)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then the same with a feed-forward network: ``moe`` or ``dense``, one of them None."""

    def __init__(self, config: TransformerConfig, run: RunShape, layer: int) -> None:
        super().__init__()
        mixture = config.has_experts(layer)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = CausalAttention(
            config.dim,
            config.heads,
            config.kv_heads or config.heads,
            config.head_width,
            out_std=config.residual_std,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            qkv_bias=config.qkv_bias,
        )
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.dense = None if mixture else SwiGLU(config.dim, config.dense_hidden, config.residual_std)
        self.moe = config.build_mixture(run, layer) if mixture else None

    def forward(self, x_BSD: Tensor, token_BS: Tensor, table_2SP: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """Return (B, S, D) rows, and what the MoE layer did, if there is one."""
        x_BSD, normed_BSD = self.attend(x_BSD, table_2SP)
        if self.moe is None:
            assert self.dense is not None
            return x_BSD + self.dense(normed_BSD), None
        mixed = self.moe(normed_BSD.flatten(0, 1), token_BS.flatten())
        return x_BSD + mixed.outputs[0].view_as(x_BSD), mixed

    def attend(self, x_BSD: Tensor, table_2SP: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, S, D) rows after attention, and the same as the feed-forward network sees them."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table_2SP)
        return x_BSD, self.feed_forward_norm(x_BSD)


@dataclass(frozen=True)
class TransformerOutput(ModelOutput):
    """Output of a decoder. ``hidden_states``: if asked for, the embeddings and the residual stream after each layer,
    (B, S, D) each."""

    hidden_states: tuple[Tensor, ...] = ()


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
        self.size = TransformerSize.of(self)

    def forward(self, token_BS: Tensor, hidden_states: bool = False) -> TransformerOutput:
        """Return (B, S, V) logits of the next tokens, and (``hidden_states``) what each layer gives."""
        x_BSD = self.embedding(token_BS)
        table_2SP = rotary_table(token_BS.shape[1], self.config.head_width, self.config.rope_theta, x_BSD)
        mixtures: list[MoEOutput] = []
        states = [x_BSD]
        for layer in self.layers:
            x_BSD, mixed = layer(x_BSD, token_BS, table_2SP)
            if mixed is not None:
                mixtures.append(mixed)
            if hidden_states:
                states.append(x_BSD)
        kept = tuple(states) if hidden_states else ()
        return TransformerOutput((self.head(self.norm(x_BSD)),), tuple(mixtures), kept)

    def activation_bytes(self, value_bytes: int, tokens: float, places: int) -> tuple[float, float]:
        """Return what autograd keeps of each operation on a CPU, without scores, as torch's fused attention has it;
        and the fp32 logits with their gradient."""
        config, vocabulary = self.config, self.embedding.num_embeddings
        queries, keys = config.width_of_queries, config.width_of_keys
        attention = 6 * config.dim + 3 * queries + 2 * keys + config.heads + 2  # with both norms before and after it
        attention += 2 * (queries + keys + 1) if config.qk_norm != "none" else 0
        dense = 4 * config.dense_hidden * (config.layers - config.num_moe_layers)
        shared = 4 * (config.shared_hidden or 0) * config.num_moe_layers
        shared += (config.dim + 2) * config.num_moe_layers if config.shared_gate else 0
        kept = config.layers * attention + dense + shared + 3 * config.dim
        logits = vocabulary * (0 if value_bytes == _FP32 else value_bytes)  # beside those that are made fp32
        return value_bytes * kept + _FP32 * vocabulary + 3 * _INT64, 2 * _FP32 * vocabulary + logits

    def training_flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Return the FLOPs of forward and backward pass, the latter being twice the former."""
        return 3 * self.size.flops_per_token(sequence_length, experts_per_token)
