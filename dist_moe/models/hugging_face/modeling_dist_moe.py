"""Our architecture for transformers: Llama with MoE layers in place of some feed-forward networks, under any gate.

    import dist_moe.models.hugging_face.modeling_dist_moe    # registers it; no trust_remote_code needed then
    model = AutoModelForCausalLM.from_pretrained(directory)

Attention, cache, masks and generation are those of transformers' Llama, but for projections with biases and with
normalised rows. In training mode a loss includes the gates'
auxiliary losses; what else a gate does between steps is left to dist_moe's own training, gradient checkpointing too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dist_moe.models.attention import normalised
from dist_moe.models.hugging_face.decoder_config import read_decoder_config
from dist_moe.models.hugging_face.files import DECODER
from dist_moe.models.hugging_face.mixtures import (
    MixtureBlock,
    WithMixtures,
    import_gates,
    keep_first_values,
    run_of,
    takes_inputs_of,
)
from dist_moe.models.transformer import TransformerConfig


class DistMoEConfig(LlamaConfig):
    """Llama's fields, and: ``mixture``: the section of our configuration for what Llama has no field for;
    ``gate_context``: what gates need to know of the training run; ``imports``: modules that register gates;
    ``qkv_bias``: biases of queries, keys and values."""

    model_type = "dist_moe"

    mixture: dict | None = None
    gate_context: dict | None = None
    imports: list | None = None
    qkv_bias: bool = False

    def section(self) -> TransformerConfig:
        """Return the section of our own configuration. Raises UserError for values that cannot be followed."""
        import_gates(self.imports)
        return read_decoder_config(self.to_dict())[0]


class NormalisedLinear(nn.Linear):
    """A projection to queries or keys whose rows are normalised: whole, or in parts of ``width``, which are heads."""

    def __init__(self, dim: int, out_dim: int, width: int, eps: float, *, bias: bool) -> None:
        super().__init__(dim, out_dim, bias)
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_dim) rows of (..., dim) ones."""
        return normalised(super().forward(x), self.norm)


def set_projections(attention: Any, section: TransformerConfig) -> None:
    """Give Llama's attention the projections that ``section`` asks for."""
    eps, bias = section.norm_eps, section.qkv_bias
    for name, width in (("q", section.width_of_queries), ("k", section.width_of_keys), ("v", section.width_of_keys)):
        layer: nn.Linear = nn.Linear(section.dim, width, bias)
        if section.qk_norm != "none" and name != "v":
            part = section.head_width if section.qk_norm == "head" else width
            layer = NormalisedLinear(section.dim, width, part, eps, bias=bias)
        setattr(attention, f"{name}_proj", layer)


class MixtureNetwork(MixtureBlock):
    """An MoE layer where Llama has a feed-forward network."""

    def __init__(self, section: TransformerConfig, config: DistMoEConfig, layer: int) -> None:
        super().__init__()
        self.moe = section.build_mixture(run_of(config.vocab_size, config.gate_context), layer)
        keep_first_values(self.moe)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Return (B, S, D) rows; every token is routed."""
        ids_T = None if self.ids_BS is None else self.ids_BS.flatten().to(hidden_BSD.device)
        self.mixture = self.moe(hidden_BSD.flatten(0, 1), ids_T)
        return self.mixture.outputs[0].view_as(hidden_BSD)


class DistMoEModel(WithMixtures, LlamaModel):
    """Llama's layers, some with MoE layers."""

    config_class = DistMoEConfig
    remote_code = DECODER

    def __init__(self, config: DistMoEConfig) -> None:
        super().__init__(config)
        section = config.section()
        for layer in self.layers if section.qkv_bias or section.qk_norm != "none" else ():
            set_projections(layer.self_attn, section)
        with torch.device("cpu"):  # transformers builds without storage, where gates could not draw their tables
            for index, layer in enumerate(self.layers):
                if section.has_experts(index):
                    layer.mlp = MixtureNetwork(section, config, index)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Return Llama's output; gates see ``input_ids``."""
        for layer in self.layers:
            if isinstance(layer.mlp, MixtureNetwork):
                layer.mlp.ids_BS = input_ids
        return super().forward(input_ids, **kwargs)


class DistMoEForCausalLM(WithMixtures, LlamaForCausalLM):
    """A decoder with MoE layers. Beside LlamaForCausalLM's outputs, ``mixtures`` has what each of them did last."""

    config_class = DistMoEConfig
    remote_code = DECODER

    def __init__(self, config: DistMoEConfig) -> None:
        super().__init__(config)
        self.model = DistMoEModel(config)
        self.post_init()

    @takes_inputs_of(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Return LlamaForCausalLM's output."""
        output: CausalLMOutputWithPast = self.forward_with_losses(super().forward, *args, **kwargs)
        return output


AutoConfig.register(DistMoEConfig.model_type, DistMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(DistMoEConfig, DistMoEForCausalLM, exist_ok=True)
