"""The GPU benchmark where there is no GPU: what it measures, what it writes, and that it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.device_path import device_path_forced
from tools.bench.gpu import CANDIDATES, SIZES, Result, Size, experts_step, layer_step, main, measure, report, verdict

SMALL = Size(tokens=24, width=16, hidden=8, experts=4, k=2)
CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--report", str(tmp_path / "gpu.md")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_candidate_takes_a_step() -> None:
    with device_path_forced():
        result = measure(SMALL, rounds=2, device=CPU, dtype=torch.float32)
    assert result.missing == {}
    assert result.seconds.keys() == CANDIDATES.keys()
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        CANDIDATES["dense"](SMALL, CPU, torch.float32)()
    assert counter.get_total_flops() == SMALL.flops


def test_a_candidate_without_memory_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> object:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(CANDIDATES, "padded", too_large)
    result = measure(SMALL, rounds=1, device=CPU, dtype=torch.float32)
    assert result.missing == {"padded": "out of memory"}
    assert "| out of memory |" in report([result], "a device", 1, 0)


def test_the_report_gives_shares_of_the_dense_rate_and_the_goal() -> None:
    fast = Result(SMALL, {"dense": 1.0, "dist_moe": 1.25, "experts": 1.1, "loop": 4.0, "padded": 2.0}, {})
    slow = Result(SIZES[0], {"dense": 1.0, "dist_moe": 2.0, "experts": 1.0, "loop": 4.0, "padded": 2.0}, {})
    text = report([fast, slow], "some GPU", 7, 3)
    assert f"| {SMALL.name} | 80% | 91% | 25% | 50% |" in text
    assert "--rounds 7 --seed 3` on one some GPU" in text
    assert verdict([fast, slow]) == (f"dist_moe reaches 80% in 1 of 2 sizes; lowest: 50% at {SIZES[0].name}.")


def test_the_sizes_are_those_that_were_promised() -> None:
    assert {size.tokens for size in SIZES} == {16384, 65536}
    assert {size.hidden for size in SIZES} == {1024, 2048, 4096}
    assert {(size.width, size.experts) for size in SIZES} == {(2048, 64)}
    assert {size.k for size in SIZES} == {2, 8}


@pytest.mark.parametrize("make", [layer_step, experts_step])
def test_steps_give_gradients_that_are_finite(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: seen.extend(original(*arguments)))
    with device_path_forced():
        make(SMALL, CPU, torch.float32)()  # type: ignore[operator]
    assert len(seen) >= 4
    assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in seen)
