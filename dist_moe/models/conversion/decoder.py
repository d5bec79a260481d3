"""Up-cycling: a dense decoder's weights as those of one with experts, equal for every gate.

    config = TransformerConfig(**sizes_of_the_dense_one, moe_every=2, num_experts=8, gate=..., experts=...)
    weights = convert_decoder(checkpoint.weights, checkpoint.config, config, DecoderConversionConfig())
    place_weights(config.build(checkpoint.vocab_size, run), weights, ROUTERS)       # gates keep their first values

Komatsuzaki et al.: Sparse Upcycling (ICLR 2023); Zhang et al.: MoEfication (Findings of ACL 2022). The result depends
on nothing but the arguments: models that differ in the gate alone start alike, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardConfig
from dist_moe.kernels import FeedForwardWeights
from dist_moe.models.conversion.networks import copies, split_exactly
from dist_moe.models.transformer import TransformerConfig

OF_MIXTURES = {
    "num_experts",
    "num_slots",
    "slot_masks",
    "experts_by_layer",
    "gate",
    "permutation",
    "activation_checkpointing",
    "moe_every",
    "experts",
    "shared_hidden",
}
"""Fields in which a converted model may differ from the dense one."""


class DecoderConversionConfig(Settings):
    """How a dense feed-forward network becomes experts."""

    method: Literal["copies", "split"] = Field(
        "copies",
        description="copies: each expert all of it; split: every neuron in one expert, together exactly the dense "
        "network where all weights are 1 / experts",
    )
    noise: float = Field(
        0.0, ge=0, description="what is added to copies, in standard deviations of the matrix that is copied"
    )
    seed: int = Field(0, ge=0, description="seed of the noise; every layer draws its own")


def convert_decoder(
    dense: Mapping[str, Tensor],
    dense_config: TransformerConfig,
    config: TransformerConfig,
    conversion: DecoderConversionConfig,
) -> dict[str, Tensor]:
    """Return weights by name, experts stacked by global id, of every parameter of ``config``'s model but its gates'.

    ``dense``: weights by name of a model of ``dense_config``, without experts. Raises UserError naming the fields that
    do not fit together.
    """
    for error in conversion_errors(dense_config, config, conversion):
        raise UserError(error)
    weights = {name: tensor.detach() for name, tensor in dense.items()}
    for layer in range(config.layers):
        if not config.has_experts(layer):
            continue
        prefix = f"layers.{layer}."
        up, down, gate = (weights.pop(f"{prefix}dense.{name}.weight").T.unsqueeze(0) for name in ("up", "down", "gate"))
        network = FeedForwardWeights(up, down, gate)
        if conversion.method == "split":
            experts = split_exactly(network, config.experts_of(layer))
        else:
            experts = copies(network, config.experts_of(layer), conversion.noise, conversion.seed * 1_000_003 + layer)
        made = experts._asdict().items()
        weights |= {f"{prefix}moe.experts.{name}": tensor for name, tensor in made if tensor is not None}
    return weights


def width_of_experts(dense_config: TransformerConfig, num_experts: int, conversion: DecoderConversionConfig) -> int:
    """Return the hidden width of experts that a conversion makes; if a split does not divide it, the next lower one."""
    return dense_config.dense_hidden // (num_experts if conversion.method == "split" else 1)


def conversion_errors(
    dense_config: TransformerConfig, config: TransformerConfig, conversion: DecoderConversionConfig
) -> Iterator[str]:
    """Yield what of the two models does not fit together, as "field=value: reason"."""
    if dense_config.moe_every:
        yield f"model.moe_every={dense_config.moe_every}: only a dense model can be converted"
    for name in sorted(TransformerConfig.model_fields.keys() - OF_MIXTURES - {"kv_heads"}):
        here, there = getattr(config, name), getattr(dense_config, name)
        if here != there:
            yield f"model.{name}={here}, but the dense model has {there}"
    if config.width_of_keys != dense_config.width_of_keys:
        yield f"model.kv_heads={config.kv_heads}, but the dense model has {dense_config.kv_heads}"
    if not config.moe_every:
        return
    if config.shared_hidden is not None:
        yield f"model.shared_hidden={config.shared_hidden}: a dense network has nothing to make it of; use null"
    for field, value, wanted in config.expert_mismatches():
        yield f"model.experts.{field}={value}: a conversion makes SwiGLU networks; use model.experts.{field}={wanted}"
    width = width_of_experts(dense_config, config.num_experts, conversion)
    if isinstance(config.experts, FeedForwardConfig) and config.experts.hidden != width:
        yield (
            f"conversion.method={conversion.method} makes experts of width {width}, model.experts.hidden="
            f"{config.experts.hidden} says otherwise; use model.experts.hidden={width}"
        )
