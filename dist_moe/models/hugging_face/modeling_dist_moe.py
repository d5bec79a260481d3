"""Our architecture for transformers: Llama with MoE layers in place of some feed-forward networks, under any gate.

    import dist_moe.models.hugging_face.modeling_dist_moe    # registers it; no trust_remote_code needed then
    model = AutoModelForCausalLM.from_pretrained(directory)

Attention, cache, masks and generation are those of transformers' Llama. In training mode a loss includes the gates'
auxiliary losses; what else a gate does between steps is left to dist_moe's own training.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dist_moe.gates import GateContext
from dist_moe.layer import MoEOutput
from dist_moe.models.hugging_face.decoder_config import CONTEXT, read_decoder_config
from dist_moe.models.moe_model import RunShape
from dist_moe.models.transformer import TransformerConfig
from dist_moe.parallel import SingleWorld

_FIRST_VALUES = "_first_values"


class DistMoEConfig(LlamaConfig):
    """Llama's fields, and: ``mixture``: the section of our configuration for what Llama has no field for;
    ``gate_context``: what gates need to know of the training run; ``imports``: modules that register gates."""

    model_type = "dist_moe"

    mixture: dict | None = None
    gate_context: dict | None = None
    imports: list | None = None

    def section(self) -> TransformerConfig:
        """As our own configuration has it. Raises UserError for values that cannot be followed."""
        for name in self.imports or ():
            importlib.import_module(name)
        return read_decoder_config(self.to_dict())[0]


class MixtureBlock(nn.Module):
    """An MoE layer where Llama has a feed-forward network. ``ids_BS``: tokens of the coming forward pass."""

    def __init__(self, section: TransformerConfig, config: DistMoEConfig) -> None:
        super().__init__()
        total_steps = (getattr(config, CONTEXT) or {}).get("total_steps")
        context = GateContext(torch.ones(config.vocab_size, dtype=torch.int64), total_steps)
        self.moe = section.build_mixture(RunShape(SingleWorld(), 1, context))
        self.ids_BS: Tensor | None = None
        self.output: MoEOutput | None = None
        for module in self.moe.modules():
            _keep_first_values(module)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        ids_T = None if self.ids_BS is None else self.ids_BS.flatten()
        self.output = self.moe(hidden_BSD.flatten(0, 1), ids_T)
        return self.output.outputs[0].view_as(hidden_BSD)


class DistMoEModel(LlamaModel):
    """Llama's layers, some with MoE layers."""

    config_class = DistMoEConfig

    def __init__(self, config: DistMoEConfig) -> None:
        super().__init__(config)
        section = config.section()
        with torch.device("cpu"):  # transformers builds without storage, where gates could not draw their tables
            for index, layer in enumerate(self.layers):
                if section.has_experts(index):
                    layer.mlp = MixtureBlock(section, config)
        self.post_init()

    @property
    def blocks(self) -> list[MixtureBlock]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureBlock)]

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        for block in self.blocks:
            block.ids_BS = input_ids
        return super().forward(input_ids, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not hasattr(module, _FIRST_VALUES):
            super()._init_weights(module)
            return
        for name, value in getattr(module, _FIRST_VALUES).items():
            module.get_buffer(name).copy_(value)


class DistMoEForCausalLM(LlamaForCausalLM):
    """A decoder with MoE layers. Beside LlamaForCausalLM's outputs, ``mixtures`` has what each of them did last."""

    config_class = DistMoEConfig

    def __init__(self, config: DistMoEConfig) -> None:
        super().__init__(config)
        self.model = DistMoEModel(config)
        self.post_init()

    @property
    def blocks(self) -> list[MixtureBlock]:
        return self.model.blocks

    @property
    def mixtures(self) -> list[MoEOutput]:
        """Of the last forward pass, by layer: routes, auxiliary losses, loads."""
        return [block.output for block in self.blocks if block.output is not None]

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        if self.training and isinstance(output, CausalLMOutputWithPast) and output.loss is not None:
            losses = [loss for mixture in self.mixtures for loss in mixture.aux.values()]
            output.loss = output.loss + sum(losses)
        return output


def _keep_first_values(module: nn.Module) -> None:
    """Parts of an MoE layer are drawn by its own rules; what no checkpoint has, transformers would leave undefined."""
    names = module._non_persistent_buffers_set
    if names:
        setattr(module, _FIRST_VALUES, {name: module.get_buffer(name).clone() for name in names})
    else:
        module._is_hf_initialized = True  # type: ignore[assignment]


AutoConfig.register(DistMoEConfig.model_type, DistMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(DistMoEConfig, DistMoEForCausalLM, exist_ok=True)
