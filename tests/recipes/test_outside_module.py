"""One module of at most 200 lines adds a gate, an expert, a model, a data set, a task, a callback, a tracker and a
recipe of two stages: trained on two ranks, killed in the second stage, resumed, evaluated, listed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from dist_moe.engine.checkpoint import newest_checkpoint, read_model
from tests.helpers.commands import Outcome, run_here
from tests.helpers.pool import RankPool
from tests.helpers.runs import losses_of

MODULE = Path(__file__).parent / "outside" / "waves.py"
STEPS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "imports": ["waves"],
        "recipe": {"name": "hold_experts"},
        "data": {"name": "waves"},
        "model": {"num_experts": 4, "gate": {"name": "cosine"}, "experts": {"name": "sine"}},
        "callbacks": [{"name": "gauge"}],
        "trackers": [{"name": "jsonl"}, {"name": "losses"}],
        "train": {"max_steps": STEPS, "epochs": 9, "batch_size": 32, "checkpoint_every": 3, "log_every": 1},
        "deepspeed": {"optimizer": {"type": "Adam", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 1}},
        "parallel": {"expert_parallel_size": 2},
    }
    path = tmp_path_factory.mktemp("outside") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_there(arguments: list[str], environment: dict[str, str]) -> Outcome:
    """``dist-moe ARGUMENTS`` where the module is."""
    os.environ |= environment
    sys.path.insert(0, str(MODULE.parent))
    return run_here(arguments)


@pytest.fixture
def command() -> Iterator[Callable[..., Outcome]]:
    """``command(*arguments, **environment)``: what the first of two ranks, which know no other module, gives."""
    pools: list[RankPool] = []

    def run(*arguments: object, **environment: str) -> Outcome:
        pools[:] = pools or [RankPool(2)]
        try:
            outcome: Outcome = pools[0].run(run_there, ([str(argument) for argument in arguments], environment))[0]
        except AssertionError:
            pools.pop().close()
            raise
        return outcome

    yield run
    for pool in pools:
        pool.close()


def weights_of(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return dict(read_model(newest_checkpoint(run / "stages" / stage)))


def test_it_is_short() -> None:
    assert len(MODULE.read_text().splitlines()) <= 200


def test_killed_in_the_second_stage_and_resumed(config: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    whole = command("train", "--run-dir", undisturbed, config)
    assert whole.code == 0, whole.err

    with pytest.raises(AssertionError, match="died"):
        command("train", "--run-dir", run, config, WAVES_KILL=str(tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    first = (run / "stages" / "all" / "metrics.jsonl").stat()
    assert not (run / "stages" / "rest" / "result.json").exists()
    resumed = command("train", "--resume", run, WAVES_KILL=str(tmp_path / "killed"))
    assert resumed.code == 0, resumed.err
    assert (run / "stages" / "all" / "metrics.jsonl").stat().st_mtime == first.st_mtime  # it was not run again

    for stage in ("all", "rest"):
        ours, theirs = weights_of(run, stage), weights_of(undisturbed, stage)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert losses_of(run / "stages" / stage).equal(losses_of(undisturbed / "stages" / stage))
    before, after = weights_of(run, "all"), weights_of(run, "rest")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"moe.gates.0.direction", "head.weight", "head.bias"}

    records = [line.split() for line in (run / "stages" / "rest" / "losses.txt").read_text().splitlines()]
    # Of the steps after the last checkpoint the tracker saw both attempts; the callback's count went on from there.
    assert [int(step) for step, *_ in records][-4:] == [7, 8, 9, 10]
    assert [float(count) for *_, count in records][-4:] == [7, 8, 9, 10]
    assert all(0 < float(score) <= 1 and math.isfinite(float(loss)) for _, loss, score, _ in records)

    evaluated = command("evaluate", "--json", run)
    assert json.loads(evaluated.out)["test"]["loss"] < 0.5


def test_it_is_listed(config: Path, command: Callable[..., Outcome]) -> None:
    listing = command("config", config, "--fields").out
    for name in ("cosine", "sine", "wave_model", "waves", "gauge", "losses", "hold_experts"):
        assert name in listing, name
    outcome = command("config", config, "model.gate.name=cosin")
    assert outcome.code == 2
    assert "model.gate.name='cosin' is not a gate; did you mean cosine?" in outcome.err
