"""A recipe of stages knows its data: the run, and every stage that it goes on with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dist_moe.engine.checkpoint import newest_checkpoint
from dist_moe.engine.checkpoint.loading import read_trainer_state
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.runs import TINY_RUN, write_yaml


def test_a_stage_goes_on_with_the_data_of_its_run_only(tmp_path: Path) -> None:
    data = tmp_path / "stars.csv"
    data.write_text("".join(f"{i % 9},{i % 7},{i % 5}\n" for i in range(200)))
    train: dict[str, Any] = {"max_steps": 2, "epochs": 9, "batch_size": 16}
    content = TINY_RUN | {"data": {"name": "stars", "root": str(data)}, "train": train, "recipe": "in_two"}
    modules = {"imports": ["tests.recipes.outside.stars"]}
    config, run = write_yaml(tmp_path, content | modules, {}), tmp_path / "run"
    succeed(1, "train", config, "--run-dir", run)
    kept = json.loads((run / "identity.json").read_text())
    stages = [run / "stages" / name for name in ("first", "second")]
    for stage in stages:
        assert json.loads((stage / "identity.json").read_text()) == kept
        assert read_trainer_state(newest_checkpoint(stage)).identity == kept
    (run / "stages" / "second" / "result.json").unlink()  # as if it had been interrupted
    data.write_text("1,2,3\n" + data.read_text())
    (refused,) = dist_moe(1, "train", "--resume", run)
    assert refused.code == 2
    assert f"{run}: the prepared data of part train" in refused.err
    # A run whose own record says otherwise: the stage's checkpoint does not.
    unsaid = shutil.copytree(run, tmp_path / "unsaid")
    (unsaid / "identity.json").unlink()
    (refused,) = dist_moe(1, "train", "--resume", unsaid)
    assert re.search(r"stages/second: the prepared data of part train.*--allow-changed-data", refused.err)
    (passed,) = succeed(1, "train", "--resume", run, "train.max_steps=3", "--allow-changed-data")
    assert "the prepared data of part train changed since the run was trained" in passed.err
    (change,) = json.loads((run / "identity.json").read_text())["changes"]
    assert change["changed"] == ["train"]  # the last fifth of the rows is what it was
    now = read_trainer_state(newest_checkpoint(stages[1]))
    assert (now.step, now.identity["changes"]) == (3, [change])
