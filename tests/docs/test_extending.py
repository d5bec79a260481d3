"""The examples of docs/extending, saved, registered and trained with as their readers would, word for word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.engine.checkpoint import read_model
from dist_moe.engine.checkpoint.files import newest_checkpoint
from tests.helpers.commands import REPOSITORY, Outcome, example_of, run_here
from tests.helpers.pool import RankPool
from tests.helpers.runs import records_of, validations_of, write_config

PAGES = REPOSITORY / "docs/extending"
FILE = re.compile(r"Save this as\s+`(\w+\.py)`")
LINES_ALLOWED = 30


@pytest.fixture(scope="module")
def process() -> Iterator[RankPool]:
    """A process of these pages' own: what their examples register stays in it."""
    pool = RankPool(1)
    yield pool
    pool.close()


def run_in(directory: Path, words: list[str]) -> Outcome:
    os.chdir(directory)
    return run_here(words)


@dataclass(frozen=True)
class Reader:
    """Somebody who follows a page in a directory that holds its example and config.yaml."""

    directory: Path
    command: list[str]
    process: RankPool

    def dist_moe(self, *words: str) -> Outcome:
        (outcome,) = self.process.run(run_in, (self.directory, list(words)))
        return outcome

    def train(self, *overrides: str) -> Path:
        """Give the page's command, and ``overrides``; return the directory of the run, which must end well."""
        outcome = self.dist_moe(*self.command, "--run-dir", "run", *overrides)
        assert outcome.code == 0, outcome.err
        return self.directory / "run"

    def evaluated(self, written: str = "summary.json") -> dict[str, Any]:
        """Return the test metrics that ``dist-moe evaluate`` gives of the run, and that the run wrote itself."""
        outcome = self.dist_moe("evaluate", "run", "--json")
        assert outcome.code == 0, outcome.err
        test: dict[str, Any] = json.loads(outcome.out)["test"]
        content = json.loads((self.directory / "run" / written).read_text())
        assert test["loss"] == pytest.approx(content.get("test", content)["loss"], rel=1e-6)
        return test


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, tiny_data: dict[str, str], process: RankPool) -> Reader:
    """The reader of the page that the test's name ends in."""
    page = PAGES / f"{request.node.name.rpartition('_')[2]}.md"
    text, example = page.read_text(), example_of(page)
    (file,), (command,) = FILE.findall(text), re.findall(r"^dist-moe (train CONFIG .*)$", text, re.MULTILINE)
    assert len([line for line in example.splitlines() if line.strip()]) <= LINES_ALLOWED
    (tmp_path / file).write_text(example)
    write_config(tmp_path, tiny_data, train={"max_steps": 30, "batch_size": 64, "checkpoint_every": 4})
    return Reader(tmp_path, shlex.split(command.replace("CONFIG", "config.yaml")), process)


def assert_it_learnt(run: Path, by: float = 0.9) -> None:
    losses = [record["loss"] for record in records_of(run)]
    assert sum(losses[-3:]) < by * sum(losses[:3])


def test_a_gate(reader: Reader) -> None:
    outcome = run_here(["config", str(reader.directory / "config.yaml"), "model.gate={name: cosine, k: 2}"])
    assert outcome.code == 2
    assert "'cosine' is not a gate; allowed: " in outcome.err
    run = reader.train("model.permutation.epochs=0.2")
    assert_it_learnt(run)
    assert records_of(run)[-1]["active_experts"] == 2
    assert reader.evaluated()["active_experts"] == 2
    outcome = reader.dist_moe("config", "config.yaml", "imports=[cosine_gate]", "model.gate={name: cosine, k: 0}")
    assert outcome.code == 2
    assert "model.gate.k=0: input should be greater than or equal to 1" in outcome.err
    outcome = reader.dist_moe("config", "config.yaml", "imports=[cosine_gatte]")
    assert outcome.code == 2
    assert "imports: the module 'cosine_gatte' cannot be imported" in outcome.err


def test_an_expert(reader: Reader) -> None:
    run = reader.train()
    assert_it_learnt(run)
    assert read_model(newest_checkpoint(run))["moe.experts.weight"].shape == (4, 16, 16)
    assert reader.evaluated()["loss"] < 5


def test_a_model(reader: Reader) -> None:
    run = reader.train("deepspeed.optimizer.params.lr=0.05")
    assert_it_learnt(run)
    assert read_model(newest_checkpoint(run))["user.weight"].shape[1] == 16
    assert reader.evaluated()["dead_experts"] < 8


def test_a_task(reader: Reader) -> None:
    random = np.random.default_rng(0)
    user_N, item_N = random.integers(30, size=2000), random.integers(20, size=2000)
    stars_N = 1 + user_N // 10 + item_N // 10
    rows = zip(user_N, item_N, stars_N, strict=True)
    (reader.directory / "ratings.csv").write_text("".join(f"{user},{item},{stars}\n" for user, item, stars in rows))
    run = reader.train("train.max_steps=60")
    assert_it_learnt(run, by=0.5)
    assert reader.evaluated()["mse"] < stars_N.var()


def test_a_recipe(reader: Reader) -> None:
    run = reader.train()
    first, second = (read_model(newest_checkpoint(run / "stages" / stage)) for stage in ("experts", "gates"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all(".gates." in name for name in changed)
    assert reader.evaluated("stages/gates/result.json")["loss"] < 5
    again = reader.dist_moe("train", "--resume", "run")  # all stages have finished
    assert again.code == 0, again.err


def test_a_tracker(reader: Reader) -> None:
    run = reader.train("train.max_steps=6")
    shutil.rmtree(newest_checkpoint(run))  # that of step 6: the run goes on from step 4
    outcome = reader.dist_moe("train", "--resume", "run", "train.max_steps=8")
    assert outcome.code == 0, outcome.err
    header, *lines = (run / "steps.csv").read_text().splitlines()
    assert header == "step,loss,lr"
    assert lines == [f"{record['step']},{record['loss']},{record['lr']}" for record in records_of(run)]
    assert len(lines) == 8


def test_a_callback(reader: Reader) -> None:
    overrides = ("train.validate_every=2", "callbacks=[{name: stop_below, loss: 100, times: 3}]")
    run = reader.train(*overrides, "train.max_steps=5")
    outcome = reader.dist_moe("train", "--resume", "run", "train.max_steps=30")
    assert outcome.code == 0, outcome.err
    assert list(validations_of(run)) == [2, 4, 6]  # two before the restart, which count
    assert records_of(run)[-1]["step"] == 6


def test_a_start(reader: Reader, tiny_data: dict[str, str]) -> None:
    np.save(reader.directory / "vectors.npy", np.ones((90, 7), dtype=np.float32))
    refused = reader.dist_moe(*reader.command, "--run-dir", "run")
    assert refused.code == 2
    assert "start.file=vectors.npy holds an array (90, 7); the model needs one (90, 8)" in refused.err
    vectors = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32)
    np.save(reader.directory / "vectors.npy", vectors)
    run = reader.train("train.max_steps=1", "deepspeed.optimizer.params.lr=0.0")
    learnt = read_model(newest_checkpoint(run))["item_embedding.weight"]
    assert torch.equal(learnt, torch.from_numpy(vectors))


def test_every_page_is_trained_with() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == {name.rpartition("_")[2] for name in globals() if re.fullmatch("test_an?_.*", name)}
