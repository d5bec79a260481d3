"""Text that a language model writes, for a person to look at."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.text import Text
from dist_moe.models import Transformer
from dist_moe.search.agreement import take_from_first_rank

SAMPLES = 3
PROMPT_TOKENS = 24
NEW_TOKENS = 60
TEMPERATURE = 0.8
_WIDTH = 110


def sample_text(model: Transformer, data: Text, seed: int = 0) -> str:
    """Return how ``model`` goes on from the beginnings of some validation sequences, as lines of text.

    The same on every rank. Collective over all ranks.
    """
    index_B = np.linspace(0, len(data.val) - 1, min(SAMPLES, len(data.val))).astype(np.int64)
    batch = data.val.batch(index_B, index_B)
    device = next(model.parameters()).device
    prompt_BS = batch.token_BS[:, :PROMPT_TOKENS].to(device)
    written_BS = write_on(model, prompt_BS, NEW_TOKENS, seed=seed, context=data.val.sequence_length)
    lines = [f"what the model writes (prompt | its own words, temperature {TEMPERATURE}):"]
    for domain, prompt, written in zip(batch.domain_B.tolist(), prompt_BS.tolist(), written_BS.tolist(), strict=True):
        text = f"[{data.domains[domain]}] {_readable(data, prompt)} | {_readable(data, written)}"
        lines.append(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


@torch.no_grad()
def write_on(
    model: Transformer,
    prompt_BS: Tensor,
    count: int,
    *,
    seed: int,
    context: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Return (B, count) tokens drawn after (B, S) given ones, each from the ``context`` tokens before it.

    The same on every rank, whatever rounding makes of the ranks' logits. Collective over all ranks.
    """
    was_training = model.training
    model.eval()
    model.begin_evaluation()
    generator = torch.Generator().manual_seed(seed)
    token_BS = prompt_BS
    for _ in range(count):
        logits_BV = model(token_BS[:, -context:]).predictions[0][:, -1]
        share_BV = (logits_BV.double() / temperature).softmax(dim=-1).cpu()
        share_BV = torch.where(share_BV.isnan(), 1.0, share_BV)  # a model that has diverged writes at random
        drawn_B1 = torch.multinomial(share_BV, 1, generator=generator).to(token_BS.device)
        token_BS = torch.cat([token_BS, take_from_first_rank(drawn_B1)], dim=1)
    model.train(was_training)
    return token_BS[:, prompt_BS.shape[1] :]


def _readable(data: Text, tokens: list[int]) -> str:
    """Return the text on one line, until it ends."""
    inside = tokens[1:] if tokens[0] == data.end_of_text else tokens
    until = inside.index(data.end_of_text) if data.end_of_text in inside else len(inside)
    return " ".join(data.tokenizer.decode(inside[:until]).split())
