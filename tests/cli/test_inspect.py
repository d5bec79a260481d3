"""dist-moe inspect and dist-moe reshard: what checkpoints hold, and the same in other files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_moe.cli.main import main
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_checkpoint, verify_checkpoint
from tests.helpers.commands import run_here, succeed
from tests.helpers.runs import losses_of, tensors_of, write_config

from .conftest import Refused

EXPERTS, STEPS, EVERY = 4, 8, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    config = write_config(root, tiny_data, train={"max_steps": STEPS, "checkpoint_every": EVERY})
    succeed(2, "train", "--run-dir", root / "run", config, "parallel.expert_parallel_size=2")
    return root / "run"


def test_a_run(run: Path) -> None:
    outcome = run_here(["inspect", str(run)])
    assert outcome.code == 0
    table, _, newest = outcome.out.partition("\n\n")
    head, *rows = table.splitlines()
    assert head.split() == ["checkpoint", "step", "written", "at", "size", "digests"]
    assert [row.split()[:2] for row in rows] == [["checkpoints/step-00000004", "4"], ["checkpoints/step-00000008", "8"]]
    assert all("2 rank(s), EP 2, ZeRO 1" in row and row.endswith("ok") for row in rows)
    tensors = tensors_of(run)
    masters = [tensor.numel() for key, tensor in tensors.items() if "|master" in key]
    experts = [tensor.numel() for key, tensor in tensors.items() if "|master|" in key]
    assert f"{sum(masters):,} parameters, {sum(experts):,} of them in experts" in newest
    lines = {line.split()[0]: line for line in newest.splitlines() if line}
    for name in {key.split("|")[0] for key in tensors}:
        assert name in lines
    assert "4 experts  (16, 16)" in lines["moe.experts.weight"]
    assert lines["moe.experts.weight"].split()[-5:] == ["master", "exp_avg", "exp_avg_sq", "12.0", "KiB"]
    assert "buffer" in lines["moe.slot_map.table"]
    assert "experts-00001.safetensors" in lines


def test_what_is_damaged(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    newest = newest_checkpoint(copy)
    os.truncate(newest / "dense.safetensors", 99)
    for path in (copy, newest):
        outcome = run_here(["inspect", str(path)])
        assert outcome.code == 2
        assert "DAMAGED" in outcome.out
        assert str(newest / "dense.safetensors") in outcome.err
    assert "step 4, format 4" in run_here(["inspect", str(copy)]).out


@pytest.mark.parametrize("files", [1, 3, 4])
def test_other_files_with_the_same_in_them(run: Path, tmp_path: Path, files: int) -> None:
    new = tmp_path / "new"
    assert main(["reshard", str(run), "--output", str(new), "--expert-files", str(files)]) == 0
    final = newest_checkpoint(new)
    assert verify_checkpoint(final).layout == verify_checkpoint(newest_checkpoint(run)).layout
    names = sorted(path.name for path in final.glob("experts-*"))
    assert names == [f"experts-{i:05d}.safetensors" for i in range(files)]
    held = [sorted({int(key.split("|")[2]) for key in load_file(final / name)}) for name in names]
    assert [expert for of_file in held for expert in of_file] == list(range(EXPERTS))
    ours, theirs = tensors_of(new), tensors_of(run)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []
    assert (final / "trainer.json").read_bytes() == (newest_checkpoint(run) / "trainer.json").read_bytes()


def test_a_run_goes_on_from_a_resharded_checkpoint(run: Path, tmp_path: Path) -> None:
    older = complete_directories(checkpoints_of(run))[0]
    assert main(["reshard", str(older), "--output", str(tmp_path / "new"), "--expert-files", "3"]) == 0
    succeed(2, "train", "--resume", tmp_path / "new")
    assert losses_of(tmp_path / "new").tolist() == losses_of(run)[EVERY:].tolist()
    ours, theirs = tensors_of(tmp_path / "new"), tensors_of(run)
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


def test_refusals(refused: Refused, run: Path, tmp_path: Path) -> None:
    refused(["inspect", tmp_path], "neither a run directory with checkpoints")
    refused(["inspect", run / "config.yaml"], "is no file of 'dist-moe export'")
    for number in (0, 5):
        refused(
            ["reshard", run, "--output", tmp_path / "new", "--expert-files", number],
            f"--expert-files {number}",
            "1 to 4",
        )
    refused(["reshard", run, "--output", run, "--expert-files", 2], "--output", "holds a run already")
    copy = shutil.copytree(run, tmp_path / "run")
    os.truncate(newest_checkpoint(copy) / "experts-00001.safetensors", 99)
    refused(["reshard", copy, "--output", tmp_path / "new", "--expert-files", 2], "experts-00001.safetensors is torn")
    assert not (tmp_path / "new").exists()
