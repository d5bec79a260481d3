"""The decoder architectures that come in and go out: how their config.json and their tensors differ from Llama's.

"llama" is our decoder without experts. "mixtral", "olmoe", "qwen2_moe" and "qwen3_moe" have a Top-k gate without bias
over SwiGLU experts. "dist_moe", our own, is Llama's architecture with MoE layers in place of some feed-forward
networks, under any gate, and with all that our attention knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_moe.errors import UserError, shown
from dist_moe.gates import TopKConfig
from dist_moe.models.attention import QKNorm
from dist_moe.models.transformer import TransformerConfig

OURS = "dist_moe"

_Q_AND_K = ("query", "key")
_SWIGLU = ("gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """A decoder architecture. Names of fields are those of its config.json.

    ``class_name``: transformers' class. ``block``: the part of a layer that has the experts. ``matrices``: the names of
    an expert's matrices, by ours; none for architectures without experts of transformers' own. ``num_experts``: fields
    that may say how many there are, the one that is written first. ``expert_hidden``: the field for their width.
    ``left_out``: transformers' own values for fields that a config.json may lack, where they are not Llama's.
    ``constants``: fields that are written and always the same. ``qk_norm``: normalisation of queries and keys.
    ``head_dim``: whether heads may have another width than hidden_size / num_attention_heads. ``qkv_bias``: the field
    that says whether queries, keys and values have biases. ``norm_topk_prob``: whether a field says whether kept router
    probabilities are divided by their sum, as they are without it. ``sparse_step``: whether some layers may be dense.
    ``shared_hidden``: the field for the width of a shared expert, which is weighted by a gate of its own.
    """

    class_name: str
    block: str = "mlp"
    matrices: Mapping[str, str] = field(default_factory=lambda: {name: f"{name}_proj" for name in _SWIGLU})
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    expert_hidden: str = "moe_intermediate_size"
    left_out: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: QKNorm = "none"
    head_dim: bool = True
    qkv_bias: str | None = None
    norm_topk_prob: bool = False
    sparse_step: bool = False
    shared_hidden: str | None = None

    @property
    def has_experts(self) -> bool:
        """Whether it is an architecture of transformers' own with experts."""
        return bool(self.matrices)

    def attention_names(self, config: TransformerConfig) -> dict[str, str]:
        """Return the names of what attention has beside its matrices, by ours, within a layer."""
        names: dict[str, str] = {}
        if config.qk_norm != "none":
            names |= {f"attention.{name}_norm.weight": f"self_attn.{self._norm_of(name)}.weight" for name in _Q_AND_K}
        if config.qkv_bias:
            names |= {f"attention.{name}.bias": f"self_attn.{name[0]}_proj.bias" for name in (*_Q_AND_K, "value")}
        return names

    def _norm_of(self, name: str) -> str:
        """Return the module that normalises queries or keys; in our own architecture it is part of a projection."""
        return f"{name[0]}_proj.norm" if self is FAMILIES[OURS] else f"{name[0]}_norm"

    def shared_names(self) -> dict[str, str]:
        """Return the names of what every token goes through beside the experts, by ours, within an MoE layer."""
        if self.shared_hidden is None:
            return {}
        names = {f"shared.{name}.weight": f"shared_expert.{name}_proj.weight" for name in _SWIGLU}
        return names | {"shared.share.weight": "shared_expert_gate.weight"}

    def misfits(self, config: TransformerConfig) -> Iterator[str]:
        """Yield what of a model it has no place for, as "field=value"."""
        if self is FAMILIES[OURS]:
            return
        if config.qk_norm != self.qk_norm:
            yield f"model.qk_norm={config.qk_norm}"
        if config.qkv_bias and self.qkv_bias is None:
            yield f"model.qkv_bias={config.qkv_bias}"
        if config.head_width * config.heads != config.dim and not self.head_dim:
            yield f"model.head_dim={config.head_dim}"
        if not self.has_experts:
            if config.moe_every:
                yield f"model.moe_every={config.moe_every}"
            return
        if config.moe_every == 0 or (config.moe_every > 1 and not self.sparse_step):
            yield f"model.moe_every={config.moe_every}"
        if (config.shared_hidden is None) != (self.shared_hidden is None):
            yield f"model.shared_hidden={config.shared_hidden}"
        elif config.shared_hidden is not None and not config.shared_gate:
            yield "model.shared_gate=False"
        yield from (f"model.experts.{name}={value}" for name, value, _ in config.expert_mismatches())
        yield from self._misfits_of_gate(config)

    def _misfits_of_gate(self, config: TransformerConfig) -> Iterator[str]:
        if config.slots_per_gate != config.num_experts:
            yield f"model.num_slots={config.num_slots}"
        if config.low_rank is not None:
            yield f"model.low_rank.rank={config.low_rank.rank}"
        if config.experts_by_layer is not None:
            yield f"model.experts_by_layer={list(config.experts_by_layer)}"
        if config.slot_masks:
            yield "model.slot_masks=True"
        gate = config.gate
        if not isinstance(gate, TopKConfig):
            yield f"model.gate.name={gate.name}"
            return
        for name, value in {"bias": False, "noise": False, "bias_update_rate": 0}.items():
            if getattr(gate, name) != value:
                yield f"model.gate.{name}={getattr(gate, name)}"
        if gate.scores != "softmax_after" and not (gate.scores == "softmax_before" and self.norm_topk_prob):
            yield f"model.gate.scores={gate.scores}"
        if config.permutation is not None and config.permutation.per_branch:
            yield "model.permutation.per_branch=True"


_QWEN = {
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "use_sliding_window": False,
}
"""Fields of both of Qwen's."""

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", matrices={}),
    "mixtral": Family(
        "MixtralForCausalLM",
        block="block_sparse_moe",
        matrices={"gate": "w1", "down": "w2", "up": "w3"},
        num_experts=("num_local_experts", "num_experts"),
        expert_hidden="intermediate_size",
        left_out={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        constants={"sliding_window": None},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        expert_hidden="intermediate_size",
        left_out={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        constants={"clip_qkv": None},
        qk_norm="all",
        head_dim=False,
        norm_topk_prob=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        left_out={**_QWEN, "num_key_value_heads": 16, "qkv_bias": True},
        constants={"mlp_only_layers": [], "use_sliding_window": False},
        qkv_bias="qkv_bias",
        norm_topk_prob=True,
        sparse_step=True,
        shared_hidden="shared_expert_intermediate_size",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        left_out={**_QWEN, "num_key_value_heads": 4},
        constants={"mlp_only_layers": [], "use_sliding_window": False},
        qk_norm="head",
        norm_topk_prob=True,
        sparse_step=True,
    ),
    OURS: Family("DistMoEForCausalLM", block="mlp.moe", matrices={}, left_out={"qkv_bias": False}, qkv_bias="qkv_bias"),
}
"""All of them, the plainest first; a module of one's own may add to them."""


def family_named(name: Any, field: str = "model_type") -> Family:
    """Return a family. Raises UserError naming those that there are; ``field``: where the name is from."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{field}={shown(name)}: there is no such decoder here; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def plainest_architecture(config: TransformerConfig) -> str:
    """Return the first architecture that has a place for all that the model is."""
    return next(name for name, family in FAMILIES.items() if not list(family.misfits(config)))
