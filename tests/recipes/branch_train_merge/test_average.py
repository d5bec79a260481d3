"""Averages of models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint import ModelWeights, read_model, write_model
from dist_moe.errors import UserError
from dist_moe.recipes.branch_train_merge.average import averaged


class Model(nn.Module):
    """Two parameters, and a buffer of whole numbers."""

    def __init__(self, seed: int, table: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(7, 5)
        self.register_buffer("table", torch.arange(table))


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., ModelWeights]:
    def write(seed: int, table: int = 3) -> ModelWeights:
        path = tmp_path / f"{seed}-{table}.safetensors"
        write_model(Model(seed, table), path, {})
        return read_model(path)

    return write


def test_it_is_the_weighted_mean(written: Callable[..., ModelWeights]) -> None:
    models = [written(seed) for seed in range(3)]
    mean = averaged(models, [1.0, 2.0, 5.0])
    for name in ("linear.weight", "linear.bias"):
        expected = sum(w * model[name].double() for w, model in zip((0.125, 0.25, 0.625), models, strict=True))
        assert mean[name].equal(expected.float())
        assert mean[name].dtype == torch.float32
    assert mean["table"].tolist() == [0, 1, 2]


def test_exact_identities(written: Callable[..., ModelWeights]) -> None:
    models = [written(seed) for seed in range(3)]
    for j, model in enumerate(models):
        one_hot = averaged(models, [float(i == j) for i in range(3)])
        copies = averaged([model] * 7, [1 / 7] * 7)
        for name in model:
            assert one_hot[name].equal(model[name])
            assert copies[name].equal(model[name])


def test_one_tensor_of_each_model_is_read_at_a_time(written: Callable[..., ModelWeights]) -> None:
    """And none before it is asked for, nor any of a model without weight."""
    read: list[tuple[int, str]] = []

    def watched(number: int, model: ModelWeights) -> ModelWeights:
        def reading(name: str, expert: int | None) -> Tensor:
            read.append((number, name))
            return model.read(name, expert)

        return replace(model, read=reading)

    mean = averaged([watched(i, written(i)) for i in range(3)], [0.5, 0.0, 0.5])
    assert read == []
    assert mean["linear.bias"] is not None
    assert {number for number, _ in read} == {0, 2}
    assert {name for _, name in read} == {"linear.bias"}


def test_what_has_no_average_is_refused(written: Callable[..., ModelWeights], tmp_path: Path) -> None:
    other = Model(9)
    other.table[0] = 2
    write_model(other, tmp_path / "other.safetensors", {})
    model = written(0)
    mean = averaged([model, read_model(tmp_path / "other.safetensors")], [0.5, 0.5])
    with pytest.raises(UserError, match=r"table differs between .* whole numbers have no average"):
        mean["table"]
    with pytest.raises(UserError, match=r"are of different models: table"):
        averaged([model, written(0, 4)], [0.5, 0.5])
