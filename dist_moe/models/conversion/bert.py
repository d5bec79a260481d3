"""A dense BERT's weights as those of one with experts, equal for every gate.

    weights = convert_bert(dense, shape, config, BertConversionConfig(), importance_LH)
    place_converted(config.build(shape, num_labels, run), weights)       # gates keep their first values

``dense``: weights of a dense :class:`~dist_moe.models.bert.BertModel` by name, for example
``BertCheckpoint.weights`` or ``dict(teacher.named_parameters())``. The result depends on nothing but the arguments:
students that differ in the gate alone start alike, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.engine.checkpoint import ROUTERS
from dist_moe.errors import UserError
from dist_moe.kernels import FeedForwardWeights
from dist_moe.models.bert import BertConfig, BertModel, BertShape
from dist_moe.models.conversion.networks import Order, copies, partition, ranked, split_exactly, take_neurons


class BertConversionConfig(Settings):
    """How a dense feed-forward network becomes experts."""

    method: Literal["partition", "split", "copies"] = Field(
        "partition",
        description="partition: MoEBERT's, the most important neurons in every expert, others dealt out, the rest "
        "left; split: every neuron in one expert, together exactly the dense network; copies: each expert all of it",
    )
    shared: int | None = Field(
        None, ge=0, description="neurons that all experts of a partition share (null: two thirds of their width)"
    )
    order: Order = Field("importance", description="which neurons a partition prefers; random and inverse to compare")
    noise: float = Field(
        0.0, ge=0, description="what is added to copies, in standard deviations of the matrix that is copied"
    )
    seed: int = Field(0, ge=0, description="seed of a random order and of the noise; every layer draws its own")

    def seed_of(self, layer: int) -> int:
        """Return the seed of layer ``layer``."""
        return self.seed * 1_000_003 + layer


def convert_bert(
    dense: Mapping[str, Tensor],
    shape: BertShape,
    config: BertConfig,
    conversion: BertConversionConfig,
    importance_LH: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return weights by name, experts stacked by global id, of every parameter of ``config``'s model but its gates'.

    ``shape``: of the dense model. ``importance_LH``: see :func:`neuron_importance`; needed by a partition that is not
    random. Layers that stay dense and are to be narrower (``config.hidden``) keep the neurons that a partition
    prefers. A plan's ``torch.device("meta")`` does not reach in here. Raises UserError for what does not fit together.
    """
    _check(shape, config, conversion)
    weights = {name: tensor.detach() for name, tensor in dense.items() if ".feed_forward." not in name}
    for layer in range(shape.layers):
        prefix = f"encoder.layers.{layer}.feed_forward."
        block = {name.removeprefix(prefix): tensor.detach() for name, tensor in dense.items() if prefix in name}
        importance_H = None if importance_LH is None else importance_LH[layer].to(block["up.weight"].device)
        with torch.device("cpu"):
            if config.has_experts(layer):
                converted = _with_experts(block, layer, shape, config, conversion, importance_H)
            else:
                converted = _narrower(block, layer, config.fitted(shape).hidden, conversion, importance_H)
        weights |= {prefix + name: tensor for name, tensor in converted.items()}
    return weights


def place_converted(model: BertModel, weights: Mapping[str, Tensor]) -> None:
    """Fill a model with converted weights; gates, and a head that there is not, keep their first values.

    Raises UserError naming what does not fit.
    """
    model.place(weights, ROUTERS)


def _with_experts(
    block: dict[str, Tensor],
    layer: int,
    shape: BertShape,
    config: BertConfig,
    conversion: BertConversionConfig,
    importance_H: Tensor | None,
) -> dict[str, Tensor]:
    network = _network(block)
    if conversion.method == "split":
        experts = split_exactly(network, config.experts_of(layer))
    elif conversion.method == "copies":
        experts = copies(network, config.experts_of(layer), conversion.noise, conversion.seed_of(layer))
    else:
        width = config.width_of_experts(shape)
        shared = 2 * width // 3 if conversion.shared is None else conversion.shared
        order_H = _order(network, conversion, importance_H, layer)
        experts = take_neurons(network, partition(order_H, config.experts_of(layer), width, shared))
    named = {f"moe.experts.{name}": tensor for name, tensor in experts._asdict().items() if tensor is not None}
    for kind in ("weight", "bias"):
        norm = block[f"norm.{kind}"]
        if config.expert_form == "network":
            named[f"norm.{kind}"] = norm
        else:
            named[f"moe.experts.norm_{kind}"] = norm.repeat(config.experts_of(layer), 1)
    return named


def _narrower(
    block: dict[str, Tensor], layer: int, width: int, conversion: BertConversionConfig, importance_H: Tensor | None
) -> dict[str, Tensor]:
    network = _network(block)
    if width == network.up.shape[2]:
        return block
    order_H = _order(network, conversion, importance_H, layer)
    kept = take_neurons(network, partition(order_H, 1, width, width))
    assert kept.up_bias is not None
    taken = {"up.weight": kept.up[0].T, "up.bias": kept.up_bias[0], "down.weight": kept.down[0].T}
    return block | {name: tensor.contiguous() for name, tensor in taken.items()}


def _network(block: dict[str, Tensor]) -> FeedForwardWeights:
    """Return two linear layers, whose weights are (out, in), as a network."""
    names = ("up.weight", "down.weight", "up.bias", "down.bias")
    up, down, up_bias, down_bias = (block[name].unsqueeze(0) for name in names)
    return FeedForwardWeights(up.transpose(1, 2), down.transpose(1, 2), None, up_bias, down_bias)


def _order(
    network: FeedForwardWeights, conversion: BertConversionConfig, importance_H: Tensor | None, layer: int
) -> Tensor:
    if importance_H is None:
        if conversion.order != "random":
            raise UserError(
                f"conversion.order={conversion.order} needs the neurons' importances, and none were given; compute "
                "them from training data, or use random"
            )
        importance_H = torch.zeros(network.up.shape[2])
    return ranked(importance_H, conversion.order, conversion.seed_of(layer))


def _check(shape: BertShape, config: BertConfig, conversion: BertConversionConfig) -> None:
    if config.fitted(shape).hidden > shape.hidden:
        raise UserError(f"model.hidden={config.hidden} exceeds the dense model's {shape.hidden}")
    if not config.moe_every or conversion.method == "partition":
        return
    if conversion.method == "split" and config.expert_form == "block":
        raise UserError(
            "conversion.method=split: experts with a LayerNorm each do not add up to the dense block; use "
            "model.expert_form=network"
        )
    whole = shape.hidden // (config.num_experts if conversion.method == "split" else 1)
    if config.width_of_experts(shape) != whole:
        raise UserError(
            f"conversion.method={conversion.method} makes experts of width {whole}, "
            f"model.expert_hidden={config.expert_hidden} says otherwise; use model.expert_hidden={whole}"
        )
