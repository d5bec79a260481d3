"""MoEBERT put together from transformers' BERT and loops over tokens: the same logits, hidden states and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.gates import HashRoutingConfig
from dist_moe.models import BertClassifier, BertClassifierConfig
from dist_moe.models.conversion import BertConversionConfig, convert_bert, place_converted
from dist_moe.recipes.distillation import MoEBERTConfig
from tests.helpers.berts import LENGTHS, SHAPE, build, dense, labels_of, mask_of, texts, twin_of
from tests.helpers.oracle import assert_same

EXPERTS, WIDTH, SHARED = 4, 6, 3
OPTIONS: dict[str, Any] = {"gate": HashRoutingConfig(seed=5), "num_experts": EXPERTS, "expert_hidden": WIDTH}
WEIGHT = 5.0


@dataclass(frozen=True)
class Step:
    """The size of a step of one batch."""

    tokens_in_step: int = sum(LENGTHS)
    examples_in_step: int = len(LENGTHS)


def importance() -> Tensor:
    return torch.rand(SHAPE.layers, SHAPE.hidden, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def converted(teacher: BertClassifier) -> BertClassifier:
    weights = dict(teacher.named_parameters())
    conversion = BertConversionConfig(shared=SHARED)
    made = convert_bert(weights, teacher.shape, BertClassifierConfig(**OPTIONS), conversion, importance())
    student = build(**OPTIONS)
    place_converted(student, made)
    return student.eval()


def hashed(layer: Any, importance_H: Tensor, table_V: Tensor, token_BS: Tensor) -> Callable[[Tensor], Tensor]:
    """In place of a layer's ``feed_forward_chunk``: every token through the neurons of its expert, one by one."""
    order = sorted(range(SHAPE.hidden), key=lambda neuron: -float(importance_H[neuron]))
    lists = [order[:SHARED] + order[SHARED + e :: EXPERTS][: WIDTH - SHARED] for e in range(EXPERTS)]
    up, down, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm

    def feed_forward(x_BSD: Tensor) -> Tensor:
        rows = []
        for x_SD, token_S in zip(x_BSD, token_BS, strict=True):
            for x_D, token in zip(x_SD, token_S, strict=True):
                neurons = lists[int(table_V[token])]
                hidden = F.gelu(up.weight[neurons] @ x_D + up.bias[neurons])
                rows.append(norm(x_D + down.weight[:, neurons] @ hidden + down.bias))
        return torch.stack(rows).view_as(x_BSD)

    return feed_forward


def test_check_h7_logits_and_loss_terms_are_those_of_a_loop_over_transformers_bert(tmp_path: Path) -> None:
    teacher = dense().eval()
    student, (token_BS, length_B) = converted(teacher), texts()
    released, its_teacher = twin_of(teacher, tmp_path / "student"), twin_of(teacher, tmp_path / "teacher")
    with torch.no_grad():  # so that a student that is as good as its teacher is no accident
        for model in (student, released):
            model.classifier.weight.mul_(1.5)
    tables = [layer.gates[0].table for layer in student.moe_layers.values()]
    assert not torch.equal(tables[0], tables[1])
    for layer, importance_H, table_V in zip(released.bert.encoder.layer, importance(), tables, strict=True):
        layer.feed_forward_chunk = hashed(layer, importance_H, table_V, token_BS)
    real_BS = mask_of(token_BS, length_B).bool()
    theirs, taught = (
        m(token_BS, attention_mask=real_BS.long(), output_hidden_states=True) for m in (released, its_teacher)
    )
    ours, our_teachers = (m(token_BS, length_B, hidden_states=True) for m in (student, teacher))
    assert_same(ours.predictions[0], theirs.logits)
    for ours_BSD, theirs_BSD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_same(ours_BSD[real_BS], theirs_BSD[real_BS])
    pairs = zip(theirs.hidden_states, taught.hidden_states, strict=True)
    hidden = sum(F.mse_loss(one[real_BS], other[real_BS]) for one, other in pairs)
    log_p, log_q = theirs.logits.log_softmax(1), taught.logits.log_softmax(1)
    both = [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((log_p, log_q), (log_q, log_p))]
    terms = MoEBERTConfig(weight=WEIGHT).terms(ours, our_teachers, Step())
    assert_same(terms["hidden"], WEIGHT * hidden)
    assert_same(terms["prediction"], WEIGHT * sum(both) / 2)
    assert min(term.item() for term in terms.values()) > 1e-3
    labels_B = labels_of(len(LENGTHS))
    loss, expected = (F.cross_entropy(logits, labels_B) for logits in (ours.predictions[0], theirs.logits))
    (loss + sum(terms.values())).backward()
    (expected + WEIGHT * (hidden + sum(both) / 2)).backward()
    embeddings = student.encoder.embeddings.token.weight.grad, released.bert.embeddings.word_embeddings.weight.grad
    for mine, its in (embeddings, (student.pooler.weight.grad, released.bert.pooler.dense.weight.grad)):
        assert mine is not None
        assert_same(mine, its)
