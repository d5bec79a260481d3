"""Metrics of a language model against loops over its tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.models import ModelOutput, RunShape, Transformer, TransformerConfig
from dist_moe.parallel import SingleWorld
from dist_moe.tasks.language.samples import write_on
from dist_moe.tasks.language.task import LanguageModelTask
from tests.helpers.texts import DOMAINS, TINY_LM


@pytest.fixture(scope="module")
def text(tiny_text: dict[str, str]) -> Text:
    sizes = {"vocab_size": 300, "sequence_length": 16, "held_out": 0.2}
    config = TextConfig(name="text", root=Path(tiny_text["root"]), cache=Path(tiny_text["cache"]), **sizes)
    return prepare_text(config, progress=False)


@pytest.fixture(scope="module")
def task(text: Text) -> LanguageModelTask:
    return LanguageModelTask(text)


def random_logits(task: LanguageModelTask, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = task.id_counts().numel()
    return torch.randn(count, task.tokens_per_example, vocabulary, generator=generator)


def test_metrics_of_random_logits(task: LanguageModelTask, text: Text) -> None:
    part, tokens = task.val, task.tokens_per_example
    logits_NSV = random_logits(task, len(part))
    nats, size = Counter[str](), Counter[str]()
    columns = []
    for n in range(len(part)):
        batch = part.batch(np.array([n]), np.array([n]))
        columns.append(task.observe(ModelOutput((logits_NSV[n : n + 1],), ()), batch))
        domain = text.domains[int(batch.domain_B[0])]
        for s, target in enumerate(batch.target_BS[0].tolist()):
            nats[domain] += math.log(sum(math.exp(x) for x in logits_NSV[n, s].tolist())) - logits_NSV[n, s, target]
            size[domain] += int(text.token_bytes_V[target])
    metrics = task.metrics(torch.cat(columns, dim=1).numpy(), part, (2.0,))
    ce = float(nats.total()) / (len(part) * tokens)
    assert metrics["loss"] == pytest.approx(2 * ce, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(float(nats.total()) / math.log(2) / size.total(), rel=1e-5)
    for domain in DOMAINS:
        expected = float(nats[domain]) / math.log(2) / size[domain]
        assert metrics[f"bits_per_byte_{domain}"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_has_diverged_has_metrics_too(task: LanguageModelTask) -> None:
    part = task.val
    columns = np.stack([np.full(len(part), 1000.0 * task.tokens_per_example), np.ones(len(part))])
    metrics = task.metrics(columns, part, (1.0,))
    assert (metrics["loss"], metrics["perplexity"]) == (pytest.approx(1000), math.inf)


def test_the_loss_of_a_step_is_that_of_its_shares(task: LanguageModelTask) -> None:
    index = np.arange(6)
    logits = random_logits(task, 6)
    whole = task.train.batch(index, index)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.target_BS.flatten())
    shares = [
        task.task_losses(ModelOutput((logits[mine],), ()), task.train.batch(index[mine], index))["ce"]
        for mine in (slice(0, 4), slice(4, 6), slice(6, 6))
    ]
    assert float(torch.stack(shares).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_the_unigram_predictor_counts_training_tokens(task: LanguageModelTask, text: Text) -> None:
    counts = Counter({v: int(count) + 1 for v, count in enumerate(text.token_counts_V)})
    assert len(counts) == text.vocab_size
    nats = size = 0.0
    for n in range(len(task.test)):
        for target in task.test.batch(np.array([n]), np.array([n])).target_BS[0].tolist():
            nats -= math.log(counts[target] / counts.total())
            size += int(text.token_bytes_V[target])
    metrics = task.baselines(task.test, (1.0,))["unigram"]
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_what_is_written_follows_the_model(task: LanguageModelTask, text: Text) -> None:
    """Cold: the likeliest token each time, from no more context than is allowed. Warm: by its own shares."""
    torch.manual_seed(0)
    model = TransformerConfig(**TINY_LM["model"]).build(text.vocab_size, RunShape(SingleWorld(), 10))
    assert isinstance(model, Transformer)
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    prompt_BS = torch.tensor([[5, 6, 7], [40, 41, 42]])
    cold_BS = write_on(model, prompt_BS, 8, seed=0, context=6, temperature=1e-4)
    model.eval()
    for prompt, written in zip(prompt_BS.tolist(), cold_BS.tolist(), strict=True):
        tokens = list(prompt)
        for _ in range(8):
            logits_V = model(torch.tensor([tokens[-6:]])).predictions[0][0, -1]
            tokens.append(int(logits_V.argmax()))
        assert written == tokens[3:]
    model.train()
    warm = [write_on(model, prompt_BS, 8, seed=seed, context=6, temperature=1.0) for seed in (0, 0, 1)]
    assert torch.equal(warm[0], warm[1])
    assert not torch.equal(warm[0], warm[2])
    assert model.training
