"""bf16 at ZeRO stages 1, 2 and 3: close to fp32, in checkpoints and after them too; evaluated as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, stage_overrides, tensors_of, train_all, write_config

STEPS = 20
BF16 = "deepspeed.bf16.enabled=true"
CASES = [(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 2, 1), (2, 2, 2), (2, 2, 3), (2, 1, 1)]


def layout(ep: int, stage: int) -> list[str]:
    return [f"parallel.expert_parallel_size={ep}", *stage_overrides(stage)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(
        tmp_path_factory.mktemp("bf16"),
        tiny_data,
        model={"permutation": {"epochs": 0.1}},
        train={"max_steps": STEPS, "checkpoint_every": 10, "keep_checkpoints": 9},
        deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 0.02, "eps": 1e-7}}},
    )


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    root = config.parent
    on_ranks(1, train_all, config, {str(root / "fp32"): []})
    for world in (1, 2):
        cells = {
            str(root / f"{world}-{ep}-{stage}"): [BF16, *layout(ep, stage)]
            for ranks, ep, stage in CASES
            if ranks == world
        }
        on_ranks(world, train_all, config, cells)
    return root


@pytest.mark.parametrize(("world", "ep", "stage"), CASES)
def test_losses_are_close_to_fp32(runs: Path, world: int, ep: int, stage: int) -> None:
    losses, reference = losses_of(runs / f"{world}-{ep}-{stage}"), losses_of(runs / "fp32")
    assert reference[-1] < reference[0] / 2
    torch.testing.assert_close(losses, reference, rtol=0.05, atol=0.02)
    assert not torch.equal(losses, reference)
    norms = [[record["grad_norm"] for record in records_of(runs / name)] for name in (f"{world}-{ep}-{stage}", "fp32")]
    torch.testing.assert_close(torch.tensor(norms[0][:5]), torch.tensor(norms[1][:5]), rtol=0.05, atol=0)


@pytest.mark.parametrize(("world", "ep", "stage"), CASES)
def test_checkpoints_hold_fp32(runs: Path, world: int, ep: int, stage: int) -> None:
    for name, tensor in tensors_of(runs / f"{world}-{ep}-{stage}").items():
        assert tensor.isfinite().all()
        if not name.endswith("|buffer"):
            assert tensor.dtype == torch.float32
        if "|master" in name and "relaxed" not in name:
            assert not torch.equal(tensor, tensor.bfloat16().float()), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2)])
def test_resume_is_exact(config: Path, runs: Path, tmp_path: Path, world: int, ep: int, stage: int) -> None:
    run = tmp_path / "run"
    succeed(world, "train", "--run-dir", run, config, BF16, *layout(ep, stage), "train.max_steps=10")
    succeed(world, "train", "--resume", run, f"train.max_steps={STEPS}")
    reference = runs / f"{world}-{ep}-{stage}"
    assert losses_of(run).tolist() == losses_of(reference).tolist()
    ours, theirs = tensors_of(run), tensors_of(reference)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def metrics_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())["test"]
    return content


def evaluated(world: int, path: Path) -> dict[str, Any]:
    first, *_ = succeed(world, "evaluate", path, "--json")
    content: dict[str, Any] = json.loads(first.out)["test"]
    return content


@pytest.mark.parametrize(("world", "ep", "stage"), [(1, 1, 1), (2, 2, 2), (2, 2, 3)])
def test_evaluated_as_it_was_trained(runs: Path, world: int, ep: int, stage: int) -> None:
    run = runs / f"{world}-{ep}-{stage}"
    assert evaluated(world, run) == metrics_of(run)


def test_an_exported_run_is_evaluated_as_it_was_trained(runs: Path, tmp_path: Path) -> None:
    """Also from a file whose weights are rounded already: rounding them again changes nothing."""
    for dtype in ("fp32", "bf16"):
        file = tmp_path / f"{dtype}.safetensors"
        succeed(1, "export", runs / "1-1-2", file, "--dtype", dtype)
        assert evaluated(1, file) == metrics_of(runs / "1-1-2")


@pytest.mark.parametrize("world", [1, 4])
def test_at_another_number_of_ranks_to_the_rounding_of_bf16(runs: Path, world: int) -> None:
    ours, theirs = evaluated(world, runs / "2-2-1"), metrics_of(runs / "2-2-1")
    assert ours.keys() == theirs.keys()
    for name in ("auc", "bce", "mse", "loss", "active_experts"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
