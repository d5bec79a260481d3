"""The ``config.json`` of a decoder language model, read and written.

Four architectures are known: "llama" is our decoder without experts; "mixtral" with a Top-k gate over experts in
every layer; "olmoe" the same with normalised queries and keys; "dist_moe", our own, is Llama's with MoE layers in place
of some feed-forward networks, under any gate. Fields that change what a model computes, and that ours cannot follow,
are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from dist_moe.errors import UserError, shown
from dist_moe.experts import FeedForwardConfig
from dist_moe.gates import TopKConfig
from dist_moe.gates.top_k import Scores
from dist_moe.models.hugging_face.files import CONTEXT, LARGEST_SIZE, MIXTURE, field_errors, followed
from dist_moe.models.transformer import TransformerConfig

Architecture = Literal["llama", "mixtral", "olmoe", "dist_moe"]
Content = Mapping[str, Any]

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "dist_moe": "DistMoEForCausalLM",
}
_NUM_EXPERTS = {"mixtral": "num_local_experts", "olmoe": "num_experts"}
"""Architectures of transformers' own with experts, in every layer behind a Top-k gate, and their field for how many."""

_SIZES = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_LEFT_OUT = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}
"""transformers' own values for fields that a config.json does not have: Llama's, and where others differ."""
_LEFT_OUT_OF: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "olmoe": {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
}

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
}
_ROPE = ("rope_scaling", "rope_parameters")
_ELSEWHERE = {"name", "rope_theta", "dense_hidden", *_SIZES}


def read_decoder_config(content: Content) -> tuple[TransformerConfig, int]:
    """Return the model's section of a configuration, and the size of its vocabulary.

    Raises UserError for an unknown architecture, or naming the fields that are missing or that ours cannot follow.
    """
    known = get_args(Architecture)
    if content.get("model_type") not in known:
        raise UserError(f"model_type={shown(content.get('model_type'))}: there is no such decoder here; known: {known}")
    architecture: Architecture = content["model_type"]
    content = {**_LEFT_OUT, **_LEFT_OUT_OF.get(architecture, {}), **content}
    for error in _errors(content):
        raise UserError(f"the Hugging Face configuration cannot be followed: {error}")
    fields = {ours: content[theirs] for ours, theirs in _SIZES.items()} | {"rope_theta": _rope(content)["rope_theta"]}
    if architecture == "llama":
        fields |= {"moe_every": 0, "dense_hidden": content["intermediate_size"]}
    elif architecture in _NUM_EXPERTS:
        is_olmoe = architecture == "olmoe"
        scores: Scores = "softmax_before" if is_olmoe and not content["norm_topk_prob"] else "softmax_after"
        fields |= {
            "moe_every": 1,
            "num_experts": content[_NUM_EXPERTS[architecture]],
            "experts": FeedForwardConfig(hidden=content["intermediate_size"]),
            "gate": TopKConfig(k=content["num_experts_per_tok"], bias=False, scores=scores),
            "qk_norm": is_olmoe,
        }
    else:
        fields |= {"dense_hidden": content["intermediate_size"], **content[MIXTURE]}
    with followed():
        config = TransformerConfig(**fields)
    of_gate = config.gate_errors() if config.moe_every else ()
    for error in (*config.validation_errors(), *of_gate):
        raise UserError(f"the Hugging Face configuration cannot be followed: {error}")
    return config, content["vocab_size"]


def write_decoder_config(
    config: TransformerConfig,
    vocab_size: int,
    architecture: Architecture,
    *,
    positions: int = 2048,
    end_of_text: int | None = None,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json``. ``positions``: tokens that a sequence should have at most.

    Raises UserError naming what ``architecture`` has no place for.
    """
    for misfit in _misfits(config, architecture):
        fitting = " or ".join(each for each in get_args(Architecture) if not list(_misfits(config, each)))
        raise UserError(
            f"{misfit}: a model of this kind cannot be written as {CLASSES[architecture]}; architectures that have a "
            f"place for it: {fitting or 'none'}"
        )
    content: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [CLASSES[architecture]],
        "vocab_size": vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.kv_heads or config.heads,
        "intermediate_size": config.dense_hidden,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,  # where versions before 5 look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": positions,
        **{f"{kind}_token_id": end_of_text for kind in ("bos", "eos")},
    }
    if architecture in _NUM_EXPERTS:
        assert isinstance(config.gate, TopKConfig)
        assert isinstance(config.experts, FeedForwardConfig)
        content |= {
            "intermediate_size": config.experts.hidden,
            _NUM_EXPERTS[architecture]: config.num_experts,
            "num_experts_per_tok": config.gate.k,
        }
        if architecture == "mixtral":
            content["sliding_window"] = None
        else:
            content |= {"norm_topk_prob": config.gate.scores == "softmax_after", "clip_qkv": None}
    elif architecture == "dist_moe":
        section = config.model_dump(mode="json")
        content[MIXTURE] = {name: value for name, value in section.items() if name not in _ELSEWHERE}
        content[CONTEXT] = {"total_steps": total_steps}
    return content


def plainest_architecture(config: TransformerConfig) -> Architecture:
    """Return the first architecture that has a place for all that the model is; our own if none has."""
    return next((each for each in get_args(Architecture) if not list(_misfits(config, each))), "dist_moe")


def _errors(content: Content) -> Iterator[str]:
    wanted = {*_SIZES.values(), "vocab_size", "intermediate_size"}
    if content["model_type"] in _NUM_EXPERTS:
        wanted |= {_NUM_EXPERTS[content["model_type"]], "num_experts_per_tok"}
    elif content["model_type"] == "dist_moe":
        wanted |= {MIXTURE}
    yield from (f"it has no {field}" for field in sorted(wanted - content.keys()))
    yield from _malformed(content, wanted)
    for field, value in _ONLY.items():
        if content.get(field, value) != value:
            yield f"{field}={shown(content[field])}; supported: {value!r}"
    rope_type = _rope(content)["rope_type"]
    if rope_type != "default":
        yield f"rope_type={shown(rope_type)}; supported: 'default'"
    if wanted <= content.keys():
        head_dim = content["hidden_size"] // content["num_attention_heads"]
        if content.get("head_dim") not in (None, head_dim):
            yield f"head_dim={shown(content['head_dim'])}; supported: hidden_size / num_attention_heads = {head_dim}"


_OPTIONAL = {"num_key_value_heads", "head_dim", *_ROPE}
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
    sizes = {*wanted, "num_key_value_heads"} - {"rms_norm_eps", "tie_word_embeddings", MIXTURE}
    yield from field_errors(given, sorted(sizes), sorted(numbers))
    for name, value in _numbers(given.get(MIXTURE), MIXTURE):
        if abs(value) > LARGEST_SIZE:
            yield f"{name}={shown(value)}; expected at most {LARGEST_SIZE}"
    for field in ("tie_word_embeddings", "norm_topk_prob"):
        if not isinstance(given.get(field, True), bool):
            yield f"{field}={shown(given[field])}; expected true or false"
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


def _misfits(config: TransformerConfig, architecture: Architecture) -> Iterator[str]:
    """Yield what of a model ``architecture`` has no place for, as "field=value"."""
    if architecture == "llama" and config.moe_every:
        yield f"model.moe_every={config.moe_every}"
    if config.qk_norm != (architecture == "olmoe"):
        yield f"model.qk_norm={config.qk_norm}"
    if architecture not in _NUM_EXPERTS:
        return
    if config.moe_every != 1:
        yield f"model.moe_every={config.moe_every}"
    if config.shared_hidden is not None:
        yield f"model.shared_hidden={config.shared_hidden}"
    yield from (f"model.experts.{field}={value}" for field, value, _ in config.expert_mismatches())
    if config.slots_per_gate != config.num_experts:
        yield f"model.num_slots={config.num_slots}"
    if config.experts_by_layer is not None:
        yield f"model.experts_by_layer={list(config.experts_by_layer)}"
    if config.slot_masks:
        yield "model.slot_masks=True"
    gate = config.gate
    if not isinstance(gate, TopKConfig):
        yield f"model.gate.name={gate.name}"
        return
    allowed = {"bias": False, "noise": False, "bias_update_rate": 0}
    for field, value in (allowed | ({"scores": "softmax_after"} if architecture == "mixtral" else {})).items():
        if getattr(gate, field) != value:
            yield f"model.gate.{field}={getattr(gate, field)}"
    if gate.scores == "sigmoid" and architecture == "olmoe":
        yield "model.gate.scores=sigmoid"
    if config.permutation is not None and config.permutation.per_branch:
        yield "model.permutation.per_branch=True"
