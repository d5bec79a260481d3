"""A decoder computed layer by layer from stored weights: the tokens go through, one layer is in memory at a time.

    flow = Flow.begin(config, weights, token_NS)
    each_layer(config, weights, run, lambda index, layer: flow.advance(layer))
    for rows, logits_BSV in flow.logits(config, weights): ...

What a model of any size says of a text takes the memory of one layer and of the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.gates import TopKConfig
from dist_moe.models.attention import rotary_table
from dist_moe.models.moe_model import RunShape
from dist_moe.models.transformer import DecoderLayer, TransformerConfig

_TOKENS_AT_ONCE = 1024


@torch.no_grad()
def each_layer(
    config: TransformerConfig, weights: ModelWeights, run: RunShape, visit: Callable[[int, DecoderLayer], None]
) -> None:
    """Call ``visit`` with each layer in order, which must not keep it: it is gone before the next one comes.

    ``weights``: of a model of ``config``, read layer by layer, and computed with in fp32.
    """
    for index in range(config.layers):
        visit(index, _layer(config, weights, run, index))


def _layer(config: TransformerConfig, weights: ModelWeights, run: RunShape, index: int) -> DecoderLayer:
    gate = config.gate
    is_plain = isinstance(gate, TopKConfig) and not gate.bias_update_rate and config.permutation is None
    # Without first values, which would take longer than reading; gates that have more than weights draw theirs.
    with torch.device("meta" if is_plain else "cpu"):
        layer = DecoderLayer(config, run, index).eval()
    layer = layer.to_empty(device="cpu") if is_plain else layer
    prefix = f"layers.{index}."
    of_layer = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    stored = replace(
        weights,
        kinds={ours: weights.kinds[name] for ours, name in of_layer.items()},
        specs={ours: weights.specs[name] for ours, name in of_layer.items()},
        read=lambda ours, expert: weights.read(of_layer[ours], expert),
    )
    unsaved = {name for name, _ in layer.named_buffers()} - layer.state_dict().keys()
    place_weights(layer, stored, fresh=tuple(unsaved))
    return layer


@dataclass
class Flow:
    """Hidden states of N sequences of S tokens on their way through the layers, (N, S, D) fp32, and their tokens."""

    config: TransformerConfig
    token_NS: Tensor
    x_NSD: Tensor

    @classmethod
    def begin(cls, config: TransformerConfig, weights: Mapping[str, Tensor], token_NS: Tensor) -> Flow:
        """Return the sequences before the first layer."""
        return cls(config, token_NS, F.embedding(token_NS, weights["embedding.weight"]).float())

    def batches(self, tokens_at_once: int = _TOKENS_AT_ONCE) -> Iterator[slice]:
        """Yield the sequences that are computed at once, by their numbers."""
        count, length = self.token_NS.shape
        size = max(1, tokens_at_once // length)
        yield from (slice(first, first + size) for first in range(0, count, size))

    def table(self) -> Tensor:
        """Return the rotary table of all positions."""
        return rotary_table(self.token_NS.shape[1], self.config.head_width, self.config.rope_theta, self.x_NSD)

    @torch.no_grad()
    def advance(self, layer: DecoderLayer, tokens_at_once: int = _TOKENS_AT_ONCE) -> None:
        """Send the sequences through a layer."""
        table_2SP = self.table()
        for rows in self.batches(tokens_at_once):
            self.x_NSD[rows] = layer(self.x_NSD[rows], self.token_NS[rows], table_2SP)[0]

    @torch.no_grad()
    def logits(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield (B, S, V) logits of one batch of :meth:`batches` after the other, after the last layer."""
        norm_D = weights["norm.weight"].float()
        head_VD = weights["embedding.weight" if self.config.tied_embeddings else "head.weight"].float()
        for rows in self.batches():
            x_BSD = F.rms_norm(self.x_NSD[rows], norm_D.shape, norm_D, self.config.norm_eps)
            yield F.linear(x_BSD, head_VD)
