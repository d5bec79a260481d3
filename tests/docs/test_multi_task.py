"""The page on tables, followed word for word."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dist_moe.engine.monitor.run_directory import RunDirectory
from tests.helpers.commands import REPOSITORY, run_here

PAGE = (REPOSITORY / "docs/multi_task.md").read_text()
ROWS = 4000


def write_visits(path: Path) -> None:
    """Users like items of their own kind; who clicks may buy, and stays longer the cheaper it is."""
    random = np.random.default_rng(0)
    user_N, item_N = random.integers(40, size=ROWS), random.integers(30, size=ROWS)
    price_N = random.lognormal(size=ROWS)
    click_N = random.random(ROWS) < np.where(user_N % 3 == item_N % 3, 0.8, 0.2)
    buy_N = click_N & (random.random(ROWS) < 0.5)
    columns = {
        "user": user_N,
        "item": [f"item {i}" for i in item_N],
        "price": price_N,
        "hour": random.integers(24, size=ROWS),
        "tags": [f"kind {i % 3}|tag {i % 7}" for i in item_N],
        "click": click_N.astype(int),
        "buy": np.where(buy_N, "yes", "no"),
        "minutes": click_N * (5 - price_N.clip(max=4)) + random.random(ROWS),
        "time": np.arange(ROWS),
    }
    pq.write_table(pa.table(columns), path)


def test_from_a_parquet_file_to_an_evaluated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    write_visits(tmp_path / "visits.parquet")
    (commands,) = re.findall(r"^```\n(dist-moe data inspect.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    inspect, train, evaluate = (shlex.split(line.partition("#")[0])[1:] for line in commands.splitlines())
    guessed = run_here(inspect)
    assert guessed.code == 0, guessed.err
    assert yaml.safe_load(guessed.out)["data"]["targets"].keys() == {"click", "buy"}
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(text.splitlines()) <= 20
    (tmp_path / "visits.yaml").write_text(text)
    trained = run_here(train)
    assert trained.code == 0, trained.err
    evaluated = run_here([*evaluate, "--json"])
    assert evaluated.code == 0, evaluated.err
    test = json.loads(evaluated.out)["test"]
    assert test["auc_click"] > 0.65  # the planted structure allows 0.78
    assert test["gauc_click"] > 0.65
    assert test["ne_click"] < 0.95
    summary = json.loads(RunDirectory(tmp_path / "run").summary.read_text())["test"]
    assert summary["loss"] == pytest.approx(test["loss"], rel=1e-6)
    (numbers,) = re.findall(r"^\| number .*?(?:\n\n|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", numbers)) <= test.keys()
    for picture in ("experts.png", "calibration.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000
