"""What a step keeps of an example for its backward pass, and what this has beside it at once: bytes, from widths.

Estimates. Those of decoders and of BERT count what autograd keeps of each operation on a CPU, attention as torch's
fused kernels have it: no scores, unless there is dropout on them. Kept is the sum over layers; at once with it is what
the backward pass of one layer, or of the loss, takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dist_moe.engine.deepspeed.config import parameter_dtype
from dist_moe.experts import BertFeedForwardBank, ConvBank, DenseReLUBank, ExpertBank, FeedForwardBank
from dist_moe.layer import MoE
from dist_moe.models import BertConfig, BertModel, MoEModel, Transformer, TransformerConfig
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks.task import ExampleShape

_FP32, _INT64 = 4, 8
_GATE_TENSORS = 8
"""Tensors of shape (tokens, branches, slots) that a gate keeps for its backward pass, about."""


@dataclass(frozen=True)
class Sent:
    """Of the rank that gets most, per token of its own and layer: rows for experts, ``sent``; rows that its experts
    get, ``received``; of both, those from and to other ranks, ``leaving`` and ``arriving``."""

    sent: int
    received: int
    leaving: float
    arriving: float

    @classmethod
    def evenly(cls, per_token: int, size: int) -> Sent:
        """``per_token`` experts, as often on each of ``size`` ranks."""
        away = per_token * (1 - 1 / size)
        return cls(per_token, per_token, away, away)

    @classmethod
    def at_worst(cls, per_token: int, local: int, size: int) -> Sent:
        """All tokens of all ranks to this rank's ``local`` experts; what these are too few for goes to others."""
        here = min(per_token, local)
        return cls(per_token, here * size, per_token - here, here * (size - 1))


def bytes_per_example(
    model: MoEModel, config: SupervisedConfig, shape: ExampleShape, sent: Sent, size: int
) -> tuple[int, int]:
    """Of the exchange, there and back; and of everything else. ``size``: ranks over which the experts are split."""
    width = parameter_dtype(config.deepspeed).itemsize
    if isinstance(model, Transformer):
        dense, passing = _decoder(model, width)
    elif isinstance(model, BertModel) and isinstance(config.model, BertConfig):
        dense, passing = _encoder(model, config.model, shape, width)
    else:
        (layer,) = model.moe_layers.values()
        return _one_layer(layer, model, width, sent, size)
    mixtures = [_mixture(layer, width, sent) for layer in model.moe_layers.values()]
    dispatch, others = _together(mixtures, dense, passing, config.model.activation_checkpointing)
    return round(dispatch * shape.tokens), round(others * shape.tokens)


@dataclass(frozen=True)
class _Mixture:
    """Bytes per token. ``rows``, ``experts``: kept, unless they are computed again: rows at the experts, and what the
    experts make of them. ``results``: kept in any case. ``gating``: of gates and pairs. ``passing``: gradients."""

    rows: float
    experts: float
    results: float
    gating: float
    passing: float


def _mixture(layer: MoE, width: int, sent: Sent) -> _Mixture:
    bank = layer.experts
    return _Mixture(
        rows=width * sent.received * bank.dim,
        experts=width * sent.received * _kept_per_row(bank),
        results=width * sent.sent * bank.out_dim,
        gating=_gating(layer, sent),
        passing=width * (sent.sent + sent.received) * (bank.dim + bank.out_dim),
    )


def _together(mixtures: list[_Mixture], dense: float, passing: float, recompute: bool) -> tuple[float, float]:
    """Dispatch, and others. With ``recompute`` one layer's rows are there at a time, beside its gradients."""
    rows, experts = [mixture.rows for mixture in mixtures], [mixture.experts for mixture in mixtures]
    over = (lambda numbers: max(numbers, default=0.0)) if recompute else sum
    dispatch = over(rows) + sum(mixture.results for mixture in mixtures)
    at_once = max([passing, *(mixture.passing for mixture in mixtures)])
    return dispatch, dense + over(experts) + sum(mixture.gating for mixture in mixtures) + at_once


def _kept_per_row(bank: ExpertBank) -> int:
    """Numbers that a feed-forward expert keeps of a row, beside the row and its result."""
    if not isinstance(bank, FeedForwardBank):
        raise TypeError(f"no layer of several has experts of {type(bank).__name__}")
    hidden = bank.hidden * (1 if bank.gate is None else 2)
    if isinstance(bank, BertFeedForwardBank):
        return hidden + bank.dim * (2 if bank.dropout else 1) + 2
    return hidden


def _decoder(model: Transformer, width: int) -> tuple[float, float]:
    """Bytes per token that everything but the MoE layers keeps; and of the loss's backward pass."""
    config: TransformerConfig = model.config
    vocabulary = model.embedding.num_embeddings
    attention = 9 * config.dim + 2 * config.width_of_keys + config.heads + 2  # with both norms before and after it
    attention += 2 * (config.dim + config.width_of_keys + 1) if config.qk_norm else 0
    dense = 4 * config.dense_hidden * (config.layers - config.num_moe_layers)
    shared = 4 * (config.shared_hidden or 0) * config.num_moe_layers
    kept = config.layers * attention + dense + shared + 3 * config.dim
    logits = vocabulary * (0 if width == _FP32 else width)  # beside those that are made fp32
    return width * kept + _FP32 * vocabulary + 3 * _INT64, 2 * _FP32 * vocabulary + logits


def _encoder(model: BertModel, config: BertConfig, shape: ExampleShape, width: int) -> tuple[float, float]:
    """The same of BERT: attention keeps places, everything else tokens; the loss takes hardly anything."""
    sizes, layers, mixtures = model.shape, model.shape.layers, len(model.moe_layers)
    fill, masks = shape.places / shape.tokens, 1 if config.dropout else 0
    scores = 3 * sizes.heads * shape.places
    attention = 3 * sizes.width + scores if config.dropout else 4 * sizes.width + sizes.heads
    around = (3 + masks) * sizes.width + 2  # what goes into the output layer, its residual and its norm
    network = 2 * sizes.hidden + (1 + masks) * sizes.width + 2
    mixed = (1 + masks) * sizes.width + 2 if config.expert_form == "network" else 0
    per_layer = layers * (fill * attention + around + sizes.width) + (layers - mixtures) * network + mixtures * mixed
    return width * (per_layer + (2 + masks) * sizes.width) + 3 * _INT64, width * 4 * sizes.width


def _one_layer(layer: MoE, model: MoEModel, width: int, sent: Sent, size: int) -> tuple[int, int]:
    """Per token, the gradients of the experts' rows included."""
    bank, received = layer.experts, sent.received
    rows_in = bank.dim * (sent.sent + (2 * received if size > 1 else 0))
    rows_out = bank.out_dim * (sent.sent + received) if size > 1 else 0
    experts = width * received * _elements_per_row(bank)
    heads = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    around = width * (bank.dim + len(layer.each_gate) * bank.out_dim + heads)
    return width * (rows_in + rows_out), _gating(layer, sent) + experts + around


def _gating(layer: MoE, sent: Sent) -> int:
    gates = layer.each_gate
    slots = _FP32 * _GATE_TENSORS * sum(gate.num_branches * gate.num_experts for gate in gates)
    return slots + sent.sent * (4 * _INT64 + _FP32 * len(gates))


def _elements_per_row(bank: ExpertBank) -> int:
    """What a bank keeps of one row for its backward pass, and the two gradients that exist beside it there."""
    if isinstance(bank, DenseReLUBank):
        return bank.out_dim * (5 if bank.dropout else 3)
    if isinstance(bank, ConvBank):
        first, second = (int(bias.shape[1]) for bias in (bank.conv1_bias, bank.conv2_bias))
        side = bank.side - 4
        pooled = side // 2
        maps = (25 + first) * side**2 + 2 * first * pooled**2 + second * (pooled - 4) ** 2
        return maps + 2 * second * bank.pooled_side**2 + 2 * bank.dense1_bias.shape[1] + 2 * bank.out_dim
    return 2 * (bank.dim + bank.out_dim)
