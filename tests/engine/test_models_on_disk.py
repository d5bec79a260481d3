"""Bare models on disk and in memory: each expert by its global id, every name accounted for, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.checkpoint import place_weights, read_model, write_first_checkpoint, write_model
from dist_moe.engine.checkpoint.files import step_directory
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.deepspeed.migration import migrate
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import UserError
from dist_moe.experts import DenseReLUBank
from dist_moe.parallel import EmulatedWorld, Placement, SingleWorld
from tests.helpers.parity import EXPERTS, Cell, engine_of, micro_batches, small_model, take_step
from tests.helpers.pool import on_ranks
from tests.helpers.runs import save_checkpoint


class Share(nn.Module):
    """Experts 1 and 3 of four, or others, and a layer and a buffer that every rank has."""

    def __init__(self, experts: Sequence[int] = (1, 3)) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.bank = DenseReLUBank(3, 5, 4, experts)
        self.register_buffer("count", torch.tensor(7))


def weights(experts: int) -> dict[str, Tensor]:
    whole = {name: torch.randn(x.shape) for name, x in Share().named_parameters()}
    stacks = {n: torch.randn(experts, *x.shape[1:]) for n, x in whole.items() if n.startswith("bank")}
    return whole | stacks


def test_a_rank_takes_its_own_experts() -> None:
    model, given = Share(), weights(4)
    place_weights(model, given)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[name][[1, 3]] if name.startswith("bank") else given[name]), name


@pytest.mark.parametrize("experts", [2, 3, 8])
def test_another_number_of_experts_is_refused_and_nothing_is_changed(experts: int) -> None:
    model = Share()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=rf"bank\.bias has shape \({experts}, 5\), the model's is \(4, 5\)"):
        place_weights(model, weights(experts))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def everything(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def write(model: nn.Module, how: str, root: Path) -> Path:
    if how == "file":
        return write_model(model, root / "a.safetensors", {"a": 1}).path or root
    return write_first_checkpoint(model, root, "here")


@pytest.mark.parametrize("how", ["file", "checkpoint"])
def test_there_and_back(tmp_path: Path, how: str) -> None:
    """Written from a model whose experts do not lie in order, read into one that has some of them."""
    whole, share = Share((2, 0, 3, 1)), Share()
    share.count.fill_(0)
    read = read_model(write(whole, how, tmp_path))
    assert read.kinds == {
        "layer.weight": "dense",
        "layer.bias": "dense",
        "bank.weight": "experts",
        "bank.bias": "experts",
        "count": "buffer",
    }
    assert (read.step, read.dtype, read.configuration) == (0, "float32", {"a": 1} if how == "file" else {})
    assert read["bank.weight"].equal(whole.bank.weight[[1, 3, 0, 2]])
    assert read.read("bank.weight", 3).equal(whole.bank.weight[2])
    place_weights(share, read)
    assert share.bank.weight.equal(whole.bank.weight[[3, 2]])
    assert share.layer.weight.equal(whole.layer.weight)
    assert share.count == 7
    again = read_model(write_first_checkpoint(read, tmp_path / "again", "there"))
    assert [name for name in read if not read[name].equal(again[name])] == []


def test_half_the_bits(tmp_path: Path) -> None:
    whole = Share(range(4))
    half = write_model(whole, tmp_path / "a", {}, torch.bfloat16)
    assert half.dtype == "bfloat16"
    for name, tensor in everything(whole).items():
        assert half[name].equal(tensor if name == "count" else tensor.bfloat16())
    widened = read_model(write_first_checkpoint(half, tmp_path, "half"))
    assert widened.dtype == "float32"
    assert widened["bank.weight"].equal(whole.bank.weight.bfloat16().float())


@pytest.mark.parametrize("how", ["file", "checkpoint"])
def test_every_name_is_accounted_for(tmp_path: Path, how: str) -> None:
    path = write(Share(range(4)), how, tmp_path)
    model = Share()
    model.layer = nn.Linear(3, 4, bias=False)
    model.register_buffer("sum", torch.zeros(1))
    before = {name: tensor.clone() for name, tensor in everything(model).items()}
    with pytest.raises(UserError) as error:
        place_weights(model, read_model(path))
    for part in (
        f"{path} is not of this model",
        "it has no sum",
        "the model has no layer.bias",
        "layer.weight has shape (2, 3), the model's is (4, 3)",
    ):
        assert part in str(error.value)
    assert all(tensor.equal(before[name]) for name, tensor in everything(model).items())


def test_a_part_of_the_experts_is_not_written(tmp_path: Path) -> None:
    for how in ("file", "checkpoint"):
        with pytest.raises(ValueError, match=r"bank holds the experts \(1, 3\) of 4 only"):
            write(Share(), how, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing", "text"])
def test_what_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match=name):
        read_model(tmp_path / name)


def train_and_save(stage: int, root: Path) -> Tensor:
    """Saved at EP 2, with experts out of order; the model's first prediction for a batch."""
    cell = Cell(2, 2, stage)
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=2)) as groups:
        engine = engine_of(cell, groups)
        take_step(engine, cell, 0)
        migrate(engine, engine.module.moe, Placement(tuple(reversed(range(EXPERTS))), 2))
        save_checkpoint(engine, root, 1, keep=1)
        (batch,) = micro_batches(1, 0, 1, 1)
        engine.eval()
        with torch.no_grad():
            prediction: Tensor = engine(*batch.inputs).predictions[0].clone()
        engine.destroy()
        return prediction


def load_unmasked(root: Path) -> str:
    """Load into an open gate what a masked one saved; the refusal."""
    cell = Cell(1, 1, 1)
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        masked, unmasked = engine_of(cell, groups), engine_of(cell, groups)
        masked.module.moe.gates[0].allow(torch.arange(EXPERTS) > 0)
        save_checkpoint(masked, root, 1, keep=1)
        before = {name: tensor.clone() for name, tensor in everything(unmasked.module).items()}
        with pytest.raises(UserError) as error:
            load_checkpoint(unmasked, step_directory(root, 1))
        assert all(tensor.equal(before[name]) for name, tensor in everything(unmasked.module).items())
        masked.destroy()
        unmasked.destroy()
        return str(error.value)


def test_a_mask_that_the_model_lacks_is_refused_by_name(tmp_path: Path) -> None:
    (refusal,) = on_ranks(1, load_unmasked, tmp_path)
    assert "is not one of this model: the model has no moe.gates.0.allowed_E" in refusal


@pytest.mark.parametrize("stage", [1, 3])
def test_written_at_two_ranks_read_without_any_group(tmp_path: Path, stage: int) -> None:
    prediction, _ = on_ranks(2, train_and_save, stage, tmp_path)
    assert not dist.is_initialized()
    weights, model = read_model(step_directory(tmp_path, 1)), small_model(SingleWorld())
    place_weights(model, weights)
    (batch,) = micro_batches(1, 0, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*batch.inputs).predictions[0], prediction, rtol=0, atol=1e-5)
    for rank, share in enumerate(EmulatedWorld(4).run(small_model)):
        place_weights(share, weights)
        for name, tensor in everything(share).items():
            mine = slice(2 * rank, 2 * rank + 2) if "experts" in name else slice(None)
            assert tensor.equal(everything(model)[name][mine] if tensor.dim() else everything(model)[name]), name
