"""The atlas: which kinds of examples each expert sees, and which words it is chosen for most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.errors import UserError
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.supervised.runs import check_same_data, find_weights, trained_model
from dist_moe.tasks import Task

EXAMPLES = 1024
"""The most examples of the test part that are looked at."""

_LEAST, _WORDS = 5, 8


@dataclass
class LayerAtlas:
    """Tokens that a layer's experts saw. ``count_CE``: by kind of example and expert. ``words_E``: as words."""

    count_CE: NDArray[np.float64]
    words_E: list[Counter[str]] = field(default_factory=list)

    @property
    def share_CE(self) -> NDArray[np.float64]:
        """The share of each kind's assignments that an expert gets; NaN for kinds that did not occur."""
        total_C1 = self.count_CE.sum(axis=1, keepdims=True)
        return np.divide(self.count_CE, total_C1, out=np.full(self.count_CE.shape, np.nan), where=total_C1 > 0)

    def favourites(self) -> list[list[str]]:
        """Return for each expert the words that it got most often, beside how often the layer's experts got them.

        Words that it got fewer than 5 times do not count.
        """
        everywhere: Counter[str] = Counter()
        for words in self.words_E:
            everywhere.update(words)
        found = []
        for words in self.words_E:
            often = [word for word, count in words.items() if count >= _LEAST and word.strip()]
            found.append(sorted(often, key=lambda word: (-words[word] / everywhere[word], -words[word]))[:_WORDS])
        return found


@dataclass(frozen=True)
class Atlas:
    """``kinds``: names of the kinds of examples. ``layers``: by name. ``examples``: how many were looked at."""

    kinds: tuple[str, ...]
    layers: dict[str, LayerAtlas]
    examples: int


Choice = tuple[Tensor, Tensor]
"""Tokens (N,) and experts (N,) of the assignments that a layer made of a batch."""

Seen = tuple[NDArray[np.int64], Sequence[str] | None, dict[str, Choice]]
"""The kind of each of the T tokens of a batch, their words if they have any, and the choices of each layer."""


def draw_up(kinds: Sequence[str], batches: Iterable[Seen], experts: int, examples: int) -> Atlas:
    """Return the atlas of ``examples`` in ``batches``. ``experts``: the most that a layer has."""
    layers: dict[str, LayerAtlas] = {}
    for kind_T, words, choices in batches:
        for name, (token_N, expert_N) in choices.items():
            tokens, chosen = token_N.cpu().numpy(), expert_N.cpu().numpy()
            empty = LayerAtlas(np.zeros((len(kinds), experts)), [Counter() for _ in range(experts)])
            layer = layers.setdefault(name, empty)
            np.add.at(layer.count_CE, (kind_T[tokens], chosen), 1.0)
            if words is not None:
                for token, expert in zip(tokens.tolist(), chosen.tolist(), strict=True):
                    layer.words_E[expert][words[token]] += 1
    return Atlas(tuple(kinds), layers, examples)


def atlas_of_run(run: Path, *, allow_changed_data: bool = False) -> Atlas:
    """Return the atlas of a run's test examples, on this process alone.

    Raises UserError if the run has no intact weights, if its data are not those that it was trained on, if its model
    has no MoE layers, and if nothing is known of the kinds of its examples.
    """
    weights = find_weights(run)
    task: Task = weights.config.data.open(progress=False)
    check_same_data(run, weights, task, allowed=allow_changed_data)
    categories = task.categories(task.test)
    model = trained_model(run, task, SingleWorld())
    if not getattr(model, "moe_layers", None):
        raise UserError(f"{run}: its model has no MoE layers")
    if categories is None:
        raise UserError(f"{run}: nothing is known of the kinds of its examples")
    rows_N = np.linspace(0, len(task.test) - 1, min(EXAMPLES, len(task.test))).astype(np.int64)
    model.eval()
    model.begin_evaluation()
    names = list(model.moe_layers)
    experts = max(layer.experts.num_experts for layer in model.moe_layers.values())

    @torch.no_grad()
    def batches() -> Iterator[Seen]:
        for place_B in shard_batches(rows_N, task.eval_batch, rank=0, world_size=1):
            index_B = rows_N[place_B]
            batch = task.test.batch(index_B, index_B)
            output = model(*batch.inputs)
            kind_T = categories.kind_N[index_B][task.example_of_token(batch).numpy()]
            choices = {}
            for name, layer in zip(names, output.layers, strict=True):  # of all gates
                token_N, expert_N = ([getattr(route, of) for route in layer.routes] for of in ("token_N", "slot_N"))
                choices[name] = (torch.cat(token_N), torch.cat(expert_N))
            yield kind_T, task.words(batch), choices

    return draw_up(categories.names, batches(), experts, len(rows_N))


def atlas_of_hugging_face(directory: Path, texts: Sequence[Path], *, length: int = 512) -> Atlas:
    """Return the atlas of a transformers mixture: which experts the tokens of each text file go to.

    ``length``: tokens that the model sees at once. Raises UserError for a model that does not tell its router's logits
    or how many experts a token gets, for texts that cannot be read, and where transformers is missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"--hf {directory}: a report of it needs transformers; install it by: pip install transformers"
        ) from error
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
        contents = [path.read_text(encoding="utf-8") for path in texts]
    except (OSError, ValueError) as error:
        raise UserError(f"--hf {directory}: {error}") from error
    k = getattr(model.config, "num_experts_per_tok", None)
    if k is None:
        raise UserError(
            f"--hf {directory}: its config.json has no num_experts_per_tok; reports are for mixtures that have one, "
            "such as Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE"
        )
    look = _router_logits(model.eval(), directory)

    @torch.no_grad()
    def batches() -> Iterator[Seen]:
        for kind, text in enumerate(contents):
            token_T = torch.tensor(tokenizer(text)["input_ids"])
            for piece_T in token_T.split(length):
                choices = {}
                for layer, logits_TE in enumerate(look(piece_T[None])):
                    expert_TK = logits_TE.topk(k, dim=-1).indices
                    row_T = torch.arange(len(expert_TK))
                    choices[f"layer {layer}"] = (row_T.repeat_interleave(k), expert_TK.flatten())
                words = [str(tokenizer.decode([token])) for token in piece_T.tolist()]
                yield np.full(len(piece_T), kind), words, choices

    experts = look(torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
    return draw_up([path.name for path in texts], batches(), experts, len(texts))


def _router_logits(model: Any, directory: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    def look(token_BS: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            logits = model(token_BS, output_router_logits=True).router_logits
        if not logits:
            raise UserError(f"--hf {directory}: {type(model).__name__} does not give router_logits; it is no mixture")
        return [layer.reshape(-1, layer.shape[-1]) for layer in logits]

    return look
