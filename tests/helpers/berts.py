"""Tiny BERT classifiers and answerers in fp64, texts for them, and the models of transformers with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_moe.engine.checkpoint import place_weights
from dist_moe.gates import GateContext
from dist_moe.models import (
    BertAnswerer,
    BertAnswererConfig,
    BertClassifier,
    BertClassifierConfig,
    BertModel,
    BertShape,
    RunShape,
)
from dist_moe.models.bert import write_hugging_face
from dist_moe.models.bert.hugging_face import HEADS, name_map
from dist_moe.parallel import SingleWorld, World
from tests.helpers.oracle import assert_same

Model = TypeVar("Model", bound=BertModel)

SHAPE = BertShape(vocab=40, width=12, layers=3, heads=3, hidden=16, positions=10)
NUM_LABELS = 3
LENGTHS = (4, 1, 7, 5)


def build(world: World | None = None, shape: BertShape = SHAPE, **options: Any) -> BertClassifier:
    """fp64, without dropout unless asked for, and no bias at zero, nor any scale at one."""
    config = BertClassifierConfig(**({"dropout": 0.0} | options))
    torch.manual_seed(0)
    return _stirred(config.build(shape, NUM_LABELS, _run_of(world, shape)).double())


def answerer(world: World | None = None, shape: BertShape = SHAPE, **options: Any) -> BertAnswerer:
    """The same with the head of an answerer; dense unless asked for."""
    config = BertAnswererConfig(**({"dropout": 0.0, "moe_every": 0} | options))
    torch.manual_seed(0)
    return _stirred(config.build(shape, _run_of(world, shape)).double())


def _run_of(world: World | None, shape: BertShape) -> RunShape:
    return RunShape(world or SingleWorld(), 10, GateContext(torch.arange(shape.vocab) + 1, 100))


@torch.no_grad()
def _stirred(model: Model) -> Model:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ("bias" in name or "norm" in name) and ".gates." not in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        elif ".moe." not in name:
            parameter.mul_(8)  # 0.02 is so small that a tiny model would be linear
    return model


def dense(**options: Any) -> BertClassifier:
    return build(moe_every=0, **options)


def texts(lengths: tuple[int, ...] = LENGTHS, vocab: int = SHAPE.vocab, seed: int = 5) -> tuple[Tensor, Tensor]:
    """``token_BS``, padded with 0, and ``length_B``."""
    generator = torch.Generator().manual_seed(seed)
    token_BS = torch.randint(1, vocab, (len(lengths), max(lengths, default=0)), generator=generator)
    length_B = torch.tensor(lengths, dtype=torch.int64)
    return token_BS * mask_of(token_BS, length_B), length_B


def share_of(whole: BertClassifier, world: World, **options: Any) -> BertClassifier:
    """The model of one rank with the weights of ``whole``, which was built with the same options."""
    share = build(world, **options)
    place_weights(share, dict(whole.named_parameters()))
    return share


def mask_of(token_BS: Tensor, length_B: Tensor) -> Tensor:
    """(B, S) int64: 1 where there is a token."""
    return (torch.arange(token_BS.shape[1]) < length_B.unsqueeze(1)).long()


def labels_of(batch: int) -> Tensor:
    return torch.arange(batch) % NUM_LABELS


def twin_of(model: BertModel, directory: Path) -> Any:
    """transformers' model with the weights and the head of a dense one, by way of ``directory``."""
    from transformers import BertForQuestionAnswering, BertForSequenceClassification

    write_hugging_face(model, directory)
    kind = BertForQuestionAnswering if isinstance(model, BertAnswerer) else BertForSequenceClassification
    dtype = model.encoder.embeddings.token.weight.dtype
    return kind.from_pretrained(directory, attn_implementation="eager", dtype=dtype).eval()


def assert_same_gradients(model: BertModel, twin: Any) -> None:
    """Every parameter's gradient beside that of transformers' model."""
    names = name_map(model.shape.layers)
    for name, parameter in model.named_parameters():
        theirs = names[name] if names[name].startswith(HEADS) else f"bert.{names[name]}"
        assert parameter.grad is not None
        assert_same(parameter.grad, twin.get_parameter(theirs).grad, name=name)
    assert len(list(model.parameters())) == len(list(twin.parameters()))
