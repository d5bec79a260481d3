"""The sizes of a BERT encoder, and how they stand in a Hugging Face ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_moe.errors import UserError

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Ours by transformers' name. "gelu" is the exact one; its approximations are other functions."""

_FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}


@dataclass(frozen=True)
class BertShape:
    """``vocab``: token ids. ``width``: of a token. ``hidden``: of a feed-forward network. ``positions``: tokens that
    a sequence may have. ``segments``: sentences that an example may have. The defaults are BERT-base's.

    Raises UserError if ``width`` is no multiple of ``heads``, or for an unknown ``activation``.
    """

    vocab: int = 30_522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    segments: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"hidden_size={self.width} is no multiple of num_attention_heads={self.heads}")
        if self.activation not in ACTIVATIONS.values():
            raise UserError(f"hidden_act={self.activation!r} is not known; allowed: {sorted(ACTIVATIONS)}")

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> BertShape:
        """From the content of ``config.json``; what is left out there has transformers' default, which is ours.

        Raises UserError for a model that is no BERT encoder with learnt absolute positions.
        """
        wanted = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
        for field, value in wanted.items():
            if config.get(field, value) != value:
                raise UserError(f"{field}={config[field]!r}: only BERT encoders with {field}={value!r} can be read")
        sizes = {ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config}
        activation = str(config.get("hidden_act", "gelu"))
        return cls(**sizes, activation=ACTIVATIONS.get(activation, activation))

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of ``config.json``."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()}
        return {"model_type": "bert", "hidden_act": self.activation, **sizes}
