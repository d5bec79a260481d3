"""How large a transformer is, and what a token costs: formulas, each compared with what is counted in its test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from dist_moe.layer import MoE

if TYPE_CHECKING:
    from dist_moe.models.transformer import TransformerConfig


@dataclass(frozen=True)
class TransformerSize:
    """Of the whole model, wherever its experts live. ``routing``: parameters of a layer's gate and of its
    permutation search; ``gate_products``: multiplications of a gate with a token, by which it chooses.

    Of a gate that finds its way without the dense products (COMET's lazy one) ``gate_products`` is an upper bound.
    """

    config: TransformerConfig
    vocab_size: int
    routing: int = 0
    gate_products: int = 0

    @classmethod
    def of(cls, config: TransformerConfig, vocab_size: int, layer: MoE | None) -> TransformerSize:
        """``layer``: any of the model's MoE layers, not yet sharded; None if it has none."""
        if layer is None:
            return cls(config, vocab_size)
        modules = [layer.gates, *([layer.permutation] if isinstance(layer.permutation, nn.Module) else [])]
        routing = sum(parameter.numel() for module in modules for parameter in module.parameters())
        tensors = [*layer.gates.parameters(), *layer.gates.buffers()]
        products = sum(t.numel() for t in tensors if t.dim() > 1 and t.shape[-1] == config.dim)
        return cls(config, vocab_size, routing, products)

    def num_params(self) -> int:
        """All parameters, those of all experts included; a tied embedding counts once."""
        return self.active_params(self.config.num_experts)

    def active_params(self, experts_per_token: float) -> int:
        """Parameters that a token meets which goes to so many experts in each MoE layer."""
        config = self.config
        tables = self.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
        norms = (2 * config.layers + 1) * config.dim
        norms += config.layers * (config.dim + config.width_of_keys) if config.qk_norm else 0
        return round(tables + norms + self._dense_weights() + self.expert_layers * self._mixture(experts_per_token))

    def flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """FLOPs of the forward pass, a multiplication and an addition counting as two.

        Of matrix products only; attention counts all pairs of positions, as torch's flop counter does, though
        half of them are masked. ``experts_per_token``: as measured, on average over tokens and MoE layers.
        """
        config = self.config
        scores = 2 * config.layers * sequence_length * config.dim  # with keys, then with values
        mixtures = self.expert_layers * (self._experts(experts_per_token) + self._shared() + self.gate_products)
        return 2.0 * (self._dense_weights() + scores + mixtures + self.vocab_size * config.dim)

    def training_flops_per_token(self, sequence_length: int, experts_per_token: float) -> float:
        """Forward and backward pass, the latter being twice the former."""
        return 3 * self.flops_per_token(sequence_length, experts_per_token)

    @property
    def expert_layers(self) -> int:
        """MoE layers."""
        return self.config.num_moe_layers

    def _dense_weights(self) -> int:
        """Of the matrices that every token meets, but for embedding, head and what belongs to MoE layers."""
        config = self.config
        attention = 2 * config.dim * (config.dim + config.width_of_keys)
        dense = 3 * config.dim * config.dense_hidden
        return config.layers * attention + (config.layers - self.expert_layers) * dense

    def _mixture(self, experts_per_token: float) -> float:
        return self._experts(experts_per_token) + self._shared() + self.routing

    def _experts(self, experts_per_token: float) -> float:
        return experts_per_token * 3 * self.config.dim * self.config.expert_hidden

    def _shared(self) -> int:
        return 3 * self.config.dim * (self.config.shared_hidden or 0)
