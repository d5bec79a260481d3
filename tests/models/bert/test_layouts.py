"""BERT with experts under DeepSpeed: three steps in any layout lead where plain torch on one process leads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.gates import CometConfig
from dist_moe.models import BertClassifier, BertOutput
from tests.helpers.berts import build, labels_of, share_of, texts
from tests.helpers.parity import ADAM, Numbers, by_expert, masters_of
from tests.helpers.pool import on_ranks

STEPS, LENGTHS = 3, (4, 2, 7, 5, 3, 6, 1, 8)
OPTIONS: dict[str, Any] = {"gate": CometConfig(k=1, gamma=0.1, entropy_weight=0.05)}
FAST = [(2, 1, 1), (2, 2, 3)]
SLOW = [(ranks, ep, stage) for ranks, ep in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)) for stage in (0, 1, 2, 3)]


def whole_model() -> BertClassifier:
    """fp32, and splits so steep that most tokens visit a single expert from the start."""
    model = build(**OPTIONS).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "split_weight" in name:
                parameter.mul_(50)
    return model


def loss_of(output: BertOutput, label_B: Tensor, length_B: Tensor) -> Tensor:
    """This part's share of the step's mean loss."""
    task = F.cross_entropy(output.predictions[0], label_B, reduction="sum") / len(LENGTHS)
    return task + output.aux["entropy"] * (length_B.sum() / sum(LENGTHS))


def batch_of(step: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    token_BS, length_B = texts(LENGTHS, seed=step)
    return token_BS[rows], length_B[rows], labels_of(len(LENGTHS))[rows]


@cache
def reference() -> Numbers:
    model = whole_model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    for step in range(STEPS):
        token_BS, length_B, label_B = batch_of(step, slice(None))
        output = model(token_BS, length_B)
        assert 1 <= output.layers[0].rows_computed / sum(LENGTHS) < 3
        optimizer.zero_grad()
        loss_of(output, label_B, length_B).backward()
        optimizer.step()
    return dict(by_expert(model, {name: p.detach() for name, p in model.named_parameters()}))


def run_stages(ep: int, stages: list[int]) -> list[Numbers]:
    """On every rank: the masters after the steps, at each stage."""
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        return [run_stage(stage, groups) for stage in stages]


def run_stage(stage: int, groups: ProcessGroups) -> Numbers:
    ranks, rank = groups.environment.world_size, groups.environment.rank
    zero = {"stage": stage, "reduce_bucket_size": 5000} | (
        {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    )
    section = {"optimizer": {"type": "AdamW", "params": dict(ADAM)}, "zero_optimization": zero}
    model = share_of(whole_model().double(), groups.world, **OPTIONS).float()
    engine = ExpertParallelEngine(model, complete_deepspeed_section(section, len(LENGTHS), ranks), groups)
    size = len(LENGTHS) // ranks
    try:
        engine.train()
        for step in range(STEPS):
            token_BS, length_B, label_B = batch_of(step, slice(rank * size, (rank + 1) * size))
            engine.backward(loss_of(engine(token_BS, length_B), label_B, length_B) * ranks)
            engine.step()
        return masters_of(engine)
    finally:
        engine.destroy()


def check(ranks: int, ep: int, stages: list[int]) -> None:
    wanted, seen = reference(), set()
    for masters_of_stages in on_ranks(ranks, run_stages, ep, stages):
        for masters in masters_of_stages:
            seen |= masters.keys()
            for name, tensor in masters.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert seen == wanted.keys()


@pytest.mark.parametrize(("ranks", "ep", "stage"), FAST)
def test_some_layouts(ranks: int, ep: int, stage: int) -> None:
    check(ranks, ep, [stage])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "ep"), sorted({layout[:2] for layout in SLOW}))
def test_all_layouts(ranks: int, ep: int) -> None:
    check(ranks, ep, [stage for one, other, stage in SLOW if (one, other) == (ranks, ep)])


def test_the_reference_moves() -> None:
    start = dict(build(**OPTIONS).float().named_parameters())
    wanted = reference()
    assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in ("pooler.weight", "classifier.bias"))
