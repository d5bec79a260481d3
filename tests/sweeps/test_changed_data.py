"""A sweep that goes on has the data with which it began: trials on others are no part of one sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.sweeps import command
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.commands import run_here

from .conftest import BASE, TOP_K, Bench, Write


def test_a_sweep_goes_on_with_the_same_data_only(
    write: Write, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a trial begins; what is let pass is in the report."""
    monkeypatch.setattr(command, "work_together", lambda *_: 0)
    monkeypatch.setattr(command, "_report", lambda *_: None)
    root = write_tiny_movielens(tmp_path / "raw")
    base = BASE | {"data": {"root": str(root), "cache": str(tmp_path / "cache")}}
    sweep = ["sweep", str(write(base, **TOP_K)), "--sweep-dir", str(bench.directory.root)]
    assert [run_here(sweep).code for _ in range(2)] == [0, 0]
    with (root / "ratings.dat").open("ab") as file:
        file.write(b"500::1::5::9\n")
    refused = run_here(sweep)
    assert refused.code == 2
    assert "the prepared data of part train" in refused.err
    assert "go on by --allow-changed-data" in refused.err
    assert run_here([*sweep, "--allow-changed-data"]).code == 0
    studies = bench.studies(base=base, **TOP_K)
    (change,) = studies.data_changes("Top-k")
    assert {"train", "test", "sizes"} <= set(change["changed"])
    assert run_here(sweep).code == 0  # the new data are those of the sweep by now
