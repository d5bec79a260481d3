"""The ``config.json`` of a decoder language model, read and written.

Fields that change what a model computes, and that ours cannot follow, are refused by name. See families.py for the
architectures that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_moe.config.settings import LARGEST_DEPTH
from dist_moe.errors import UserError, shown
from dist_moe.experts import FeedForwardConfig
from dist_moe.gates import TopKConfig
from dist_moe.models.hugging_face.families import FAMILIES, OURS, Family, family_named
from dist_moe.models.hugging_face.files import CONTEXT, LARGEST_SIZE, MIXTURE, field_errors, followed
from dist_moe.models.transformer import TransformerConfig

Content = Mapping[str, Any]

_SIZES = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_LEFT_OUT = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}
"""transformers' own values for fields that a config.json does not have: Llama's; see Family for others."""

_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "sliding_window": None,
    "quantization_config": None,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "router_jitter_noise": 0,
    "pretraining_tp": 1,
    "clip_qkv": None,
    "use_sliding_window": False,
}
_ROPE = ("rope_scaling", "rope_parameters")
_ELSEWHERE = {"name", "rope_theta", "dense_hidden", "head_dim", "qkv_bias", *_SIZES}


def read_decoder_config(content: Content) -> tuple[TransformerConfig, int]:
    """Return the model's section of a configuration, and the size of its vocabulary.

    Raises UserError for an unknown architecture, or naming the fields that are missing or that ours cannot follow.
    """
    family = family_named(content.get("model_type"))
    content = _completed(content, family)
    for error in _errors(content, family):
        raise UserError(f"the Hugging Face configuration cannot be followed: {error}")
    fields = {ours: content[theirs] for ours, theirs in _SIZES.items()} | {"rope_theta": _rope(content)["rope_theta"]}
    fields |= {"dense_hidden": content["intermediate_size"], "qkv_bias": bool(family.qkv_bias and content["qkv_bias"])}
    if content.get("head_dim") != fields["dim"] // fields["heads"]:
        fields["head_dim"] = content.get("head_dim")
    if family.has_experts:
        renormalised = not family.norm_topk_prob or content["norm_topk_prob"]
        fields |= {
            "moe_every": _moe_every(content),
            "num_experts": content[family.num_experts[0]],
            "experts": FeedForwardConfig(hidden=content[family.expert_hidden]),
            "gate": TopKConfig(
                k=content["num_experts_per_tok"],
                bias=False,
                scores="softmax_after" if renormalised else "softmax_before",
            ),
            "qk_norm": family.qk_norm,
            "shared_hidden": content[family.shared_hidden] if family.shared_hidden else None,
            "shared_gate": family.shared_hidden is not None,
        }
    else:
        fields |= content[MIXTURE] if family is FAMILIES[OURS] else {"moe_every": 0}
    with followed():
        config = TransformerConfig(**fields)
    of_gate = config.gate_errors() if config.moe_every else ()
    for error in (*config.validation_errors(), *of_gate):
        raise UserError(f"the Hugging Face configuration cannot be followed: {error}")
    return config, content["vocab_size"]


def write_decoder_config(
    config: TransformerConfig,
    vocab_size: int,
    architecture: str,
    *,
    positions: int = 2048,
    end_of_text: int | None = None,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json``. ``positions``: tokens that a sequence should have at most.

    Raises UserError naming what ``architecture`` has no place for.
    """
    family = family_named(architecture)
    for misfit in family.misfits(config):
        fitting = " or ".join(name for name, other in FAMILIES.items() if not list(other.misfits(config)))
        raise UserError(
            f"{misfit}: a model of this kind cannot be written as {family.class_name}; architectures that have a "
            f"place for it: {fitting}"
        )
    content: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [family.class_name],
        "vocab_size": vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_width,
        "intermediate_size": config.dense_hidden,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,  # where versions before 5 look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": positions,
        **{f"{kind}_token_id": end_of_text for kind in ("bos", "eos")},
    }
    content |= family.constants
    if family.qkv_bias:
        content[family.qkv_bias] = config.qkv_bias
    if family.has_experts:
        assert isinstance(config.gate, TopKConfig)
        assert isinstance(config.experts, FeedForwardConfig)
        content |= {
            family.num_experts[0]: config.num_experts,
            family.expert_hidden: config.experts.hidden,
            "num_experts_per_tok": config.gate.k,
        }
        if family.norm_topk_prob:
            content["norm_topk_prob"] = config.gate.scores == "softmax_after"
        if family.sparse_step:
            content["decoder_sparse_step"] = config.moe_every
        if family.shared_hidden:
            content[family.shared_hidden] = config.shared_hidden
    elif architecture == OURS:
        section = config.model_dump(mode="json")
        content[MIXTURE] = {name: value for name, value in section.items() if name not in _ELSEWHERE}
        content[CONTEXT] = {"total_steps": total_steps}
    return content


def _completed(content: Content, family: Family) -> dict[str, Any]:
    """Return the content with what it leaves out, as transformers completes it."""
    whole = {**_LEFT_OUT, **family.left_out, **content}
    for name in family.num_experts if family.has_experts else ():  # versions of transformers differ
        if name in content:
            whole.setdefault(family.num_experts[0], content[name])
    if "use_sliding_window" in family.left_out:
        whole.pop("sliding_window", None)  # some width, which is not looked at unless that field is true
    return whole


def _moe_every(content: Content) -> int:
    """Return m if the layers with experts are every m-th one. Raises UserError if they are others."""
    step, dense = content.get("decoder_sparse_step", 1), content.get("mlp_only_layers")
    if not dense:
        return int(step)
    layers = range(min(content["num_hidden_layers"], LARGEST_DEPTH))
    sparse = [layer for layer in layers if (layer + 1) % step == 0 and layer not in dense]
    every = sparse[0] + 1 if sparse else 1
    if sparse == [layer for layer in layers if (layer + 1) % every == 0]:
        return every
    raise UserError(
        f"the Hugging Face configuration cannot be followed: decoder_sparse_step={step}, mlp_only_layers={dense}: the "
        f"layers with experts are {sparse}; supported: every m-th layer, beginning with m - 1"
    )


def _errors(content: Content, family: Family) -> Iterator[str]:
    wanted = {*_SIZES.values(), "vocab_size", "intermediate_size"}
    if family.has_experts:
        wanted |= {family.num_experts[0], family.expert_hidden, "num_experts_per_tok"}
        wanted |= {"decoder_sparse_step"} if family.sparse_step else set()
        wanted |= {family.shared_hidden} if family.shared_hidden else set()
    elif family is FAMILIES[OURS]:
        wanted |= {MIXTURE}
    yield from (f"it has no {field}" for field in sorted(wanted - content.keys()))
    yield from _malformed(content, wanted)
    for field, value in _ONLY.items():
        if content.get(field, value) != value:
            yield f"{field}={shown(content[field])}; supported: {value!r}"
    rope_type = _rope(content)["rope_type"]
    if rope_type != "default":
        yield f"rope_type={shown(rope_type)}; supported: 'default'"
    others = set(content.get("layer_types") or ()) - {"full_attention"}
    if others:
        yield f"layer_types: {shown(sorted(others))}; supported: full_attention"
    if wanted <= content.keys() and not family.head_dim:
        head_dim = content["hidden_size"] // content["num_attention_heads"]
        if content.get("head_dim") not in (None, head_dim):
            yield f"head_dim={shown(content['head_dim'])}; supported: hidden_size / num_attention_heads = {head_dim}"


_OPTIONAL = {"num_key_value_heads", "head_dim", "mlp_only_layers", "layer_types", *_ROPE}
"""Fields that may be null."""


def _malformed(content: Content, wanted: set[str]) -> Iterator[str]:
    """Yield fields of a wrong type or size, the first of which stops all that follows."""
    given = {field: value for field, value in content.items() if not (field in _OPTIONAL and value is None)}
    numbers = {"rms_norm_eps", "rope_theta"}
    yield from (
        f"{field}={shown(given[field])}; expected an object"
        for field in (*_ROPE, MIXTURE)
        if not isinstance(given.get(field, {}), dict)
    )
    sizes = {*wanted, "num_key_value_heads", "head_dim"} - {"rms_norm_eps", "tie_word_embeddings", MIXTURE}
    yield from field_errors(given, sorted(sizes), sorted(numbers))
    for name, value in _numbers(given.get(MIXTURE), MIXTURE):
        if abs(value) > LARGEST_SIZE:
            yield f"{name}={shown(value)}; expected at most {LARGEST_SIZE}"
    for field in ("tie_word_embeddings", "norm_topk_prob", "qkv_bias", "use_sliding_window"):
        if not isinstance(given.get(field, True), bool):
            yield f"{field}={shown(given[field])}; expected true or false"
    for field, kind in (("mlp_only_layers", int), ("layer_types", str)):
        listed = given.get(field) or []
        if not isinstance(listed, list) or any(type(entry) is not kind for entry in listed):
            yield f"{field}={shown(listed)}; expected a list of {kind.__name__}"
    yield from field_errors(_rope(content), (), ("rope_theta",))


def _numbers(content: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield all whole numbers within an object by their dotted names."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        if isinstance(value, int):
            yield f"{name}.{key}", value
        yield from _numbers(value, f"{name}.{key}")


def _rope(content: Content) -> dict[str, Any]:
    """Return ``rope_type`` and ``rope_theta``, wherever they stand: versions of transformers differ."""
    scaling = content.get("rope_scaling") or {}
    found = {"rope_type": "default", "rope_theta": content["rope_theta"], **scaling}
    found |= content.get("rope_parameters") or {}
    return found | {"rope_type": found.get("type") or found["rope_type"]}
