"""Text as a task: which token comes next?

The loss is the cross-entropy of every token in nats. Models with other tokens are compared by bits per byte:
all nats of a text, over ln 2, over the bytes of UTF-8 that its tokens stand for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.data.text import Text, TokenBatch, TokenTable
from dist_moe.models import ModelOutput, Transformer
from dist_moe.tasks.language.samples import sample_text
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Categories, Columns, Metrics, PredictionKind, Task

EVAL_TOKENS = 4096
"""Evaluated at once on a rank: their logits are V numbers each."""

_BASELINE_BATCH = 1024
_LARGEST_EXPONENT = math.log(sys.float_info.max)


class LanguageModelTask(Task):
    """One task on sequences of tokens; gates that route by identity see the token."""

    kind = "language"

    def __init__(self, data: Text) -> None:
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest
        self.tokens_per_example = data.train.sequence_length
        self.eval_batch = max(1, EVAL_TOKENS // self.tokens_per_example)
        self.vocab_size = data.vocab_size
        self.tokenizer = data.tokenizer
        self.end_of_text = data.end_of_text
        self.data = data

    def model_inputs(self) -> dict[str, Any]:
        """Return the size of the vocabulary."""
        return {"vocab_size": self.vocab_size}

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The next token's logits."""
        return ("classes",)

    def costs(self, model: Transformer, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``parameters``, ``active_parameters`` and forward FLOPs, at the measured experts per token."""
        size, experts = model.size, float(metrics["active_experts"])
        return {
            "parameters": size.num_params(),
            "active_parameters": size.active_params(experts),
            "flops_per_token": size.flops_per_token(self.tokens_per_example, experts),
        }

    def id_counts(self) -> Tensor:
        """Return how often each token occurs."""
        return torch.tensor(self.data.token_counts_V, dtype=torch.int64)

    def task_losses(self, output: ModelOutput, batch: TokenBatch) -> dict[str, Tensor]:
        """Return ``ce``: nats of all tokens over the number of tokens in the step."""
        return {"ce": token_nats(output, batch).sum() / batch.tokens_in_step}

    def observe(self, output: ModelOutput, batch: TokenBatch) -> Tensor:
        """Return the nats of each sequence, and its bytes."""
        return torch.stack([token_nats(output, batch).double().sum(dim=1), batch.bytes_B.double()])

    def metrics(self, columns: Columns, part: TokenTable, weights: tuple[float, ...]) -> Metrics:
        """Return ``loss``, nats per token; its exponential; bits per byte of all and of each domain in ``part``."""
        nats_N, bytes_N = columns
        ce = float(nats_N.sum()) / (len(part) * self.tokens_per_example)
        # The metrics of a model that has diverged are wanted too.
        perplexity = math.inf if ce >= _LARGEST_EXPONENT else math.exp(ce)
        metrics = {"loss": weights[0] * ce, "perplexity": perplexity, "bits_per_byte": _bits(nats_N, bytes_N)}
        domain_N = np.asarray(part.domain_N)
        for number, name in enumerate(self.data.domains):
            mine_N = domain_N == number
            if mine_N.any():
                metrics[f"bits_per_byte_{name}"] = _bits(nats_N[mine_N], bytes_N[mine_N])
        return metrics

    def baselines(self, part: TokenTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``unigram``: every token's share of the training tokens, each counted once more than it occurs."""
        count_V = np.asarray(self.data.token_counts_V, dtype=np.float64) + 1
        nats_V = np.log(count_V.sum()) - np.log(count_V)
        columns = []
        for index_B in shard_batches(part, _BASELINE_BATCH, rank=0, world_size=1):
            batch = part.batch(index_B, index_B)
            columns.append(np.stack([nats_V[batch.target_BS.numpy()].sum(axis=1), batch.bytes_B.numpy()]))
        return {"unigram": self.metrics(np.concatenate(columns, axis=1), part, weights)}

    def categories(self, part: TokenTable) -> Categories:
        """Return the domain of each sequence."""
        return Categories(tuple(self.data.domains), np.asarray(part.domain_N))

    def words(self, batch: TokenBatch) -> list[str]:
        """Return the text of each token."""
        return [self.tokenizer.decode([token]) for token in batch.token_BS.flatten().tolist()]

    def final_report(self, model: Transformer) -> str:
        """Return how the model goes on from the beginnings of some validation sequences."""
        return sample_text(model, self.data)


def token_nats(output: ModelOutput, batch: TokenBatch) -> Tensor:
    """Return (B, S) nats of every target: its negative log-probability given the tokens before it."""
    (logits_BSV,) = output.predictions
    nats_T = F.cross_entropy(at_least_fp32(logits_BSV).flatten(0, 1), batch.target_BS.flatten(), reduction="none")
    return nats_T.view_as(batch.target_BS)


def _bits(nats_N: Columns, bytes_N: Columns) -> float:
    return float(nats_N.sum() / math.log(2) / bytes_N.sum())
