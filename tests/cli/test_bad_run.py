"""Run directories and checkpoints that cannot be used: exit code 2, the file by name, and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, drop_after
from dist_moe.engine.checkpoint.format import FORMAT_VERSION
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import succeed
from tests.helpers.runs import largest_difference, losses_of, records_of, tensors_of, write_config

from .conftest import Refused

STEPS, EVERY = 8, 4
FILES = ["dense.safetensors", "experts-00000.safetensors", "trainer.json", "manifest.json"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = [flip_a_bit, cut_short, os.remove]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """A run of one process with two checkpoints."""
    root = tmp_path_factory.mktemp("finished")
    train = {"max_steps": STEPS, "checkpoint_every": EVERY, "log_every": 3}
    succeed(1, "train", "--run-dir", root / "run", write_config(root, tiny_data, train=train))
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoints(run: Path) -> tuple[Path, Path]:
    older, newer = complete_directories(checkpoints_of(run))
    return older, newer


def damage_manifest_digest(file: Path) -> None:
    text = file.read_text()
    digest = text.split('"')[-2]
    file.write_text(text.replace(digest, digest[::-1]))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_the_only_checkpoint_is_damaged(refused: Refused, run: Path, name: str, damage: Callable[[Path], None]) -> None:
    older, newer = checkpoints(run)
    shutil.rmtree(older)
    if name == "manifest.json" and damage is flip_a_bit:
        damage_manifest_digest(newer / name)
    else:
        damage(newer / name)
    part = str(newer) if name == "manifest.json" else str(newer / name)
    refused(["train", "--resume", run], part, "--run-dir")
    refused(["evaluate", run], part)


@pytest.mark.parametrize("name", ["experts-00000.safetensors", "manifest.json"])
def test_resume_goes_on_from_the_last_good_one(refused: Refused, finished: Path, run: Path, name: str) -> None:
    """An evaluation does not: it would be of other weights than were asked for."""
    older, newer = checkpoints(run)
    cut_short(newer / name)
    refused(["evaluate", run], str(newer), name)
    (outcome,) = succeed(1, "train", "--resume", run)
    for part in ("warning", str(newer), name, older.name):
        assert part in outcome.err
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert steps_of(read_board(run), "loss/task") == list(range(1, STEPS + 1))
    assert losses_of(run).tolist() == losses_of(finished).tolist()
    assert largest_difference(tensors_of(run), tensors_of(finished)) == 0


def test_a_damaged_checkpoint_that_was_passed_over_stands_aside(run: Path) -> None:
    """Also where the resumed run ends before it comes to that step again; nothing of it is lost."""
    _, newer = checkpoints(run)
    cut_short(newer / "dense.safetensors")
    before = contents_of(newer)
    (outcome,) = succeed(1, "train", "--resume", run, f"train.max_steps={EVERY + 2}")
    aside = newer.with_name(f"{newer.name}.damaged")
    assert not newer.exists()
    assert contents_of(aside) == before
    assert str(aside) in outcome.err
    assert f"step-{EVERY + 2:08d}" in succeed(1, "evaluate", run)[0].out


def contents_of(directory: Path) -> dict[str, bytes]:
    """Every file under a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def make_newer(directory: Path) -> None:
    """Its manifest says that it is of the next format."""
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": FORMAT_VERSION + 1}))


def test_a_newer_format_is_refused_and_kept(refused: Refused, run: Path) -> None:
    """It is not damaged: a run that went on before it would lose what a newer version has done."""
    older, newer = checkpoints(run)
    make_newer(newer)
    before = contents_of(run)
    for command in (["train", "--resume", run], ["evaluate", run]):
        refused(command, str(newer), f"format_version={FORMAT_VERSION + 1}", f"reads and writes {FORMAT_VERSION} only")
    assert contents_of(run) == before
    newer.rename(newer.with_name("kept"))
    succeed(1, "train", "--resume", run)
    assert contents_of(older.with_name("kept")).keys() > {"manifest.json"}


def test_a_best_checkpoint_of_a_newer_format_is_refused_and_kept(refused: Refused, run: Path) -> None:
    _, newer = checkpoints(run)
    best = Path(shutil.copytree(newer, run / "best" / newer.name))
    make_newer(best)
    refused(["train", "--resume", run], str(best), "format_version")
    assert best.is_dir()


FOREIGN = [
    "step-00000004-backup",
    "step-4",
    "step-000000004",
    "step-00000004.damaged",
    ".step-x.partial",
    ".step-00000004.partial-old",
    "step-0000000\N{ARABIC-INDIC DIGIT FOUR}",
    "Step-00000004",
]


def test_what_is_not_ours_is_neither_read_nor_counted_nor_removed(run: Path, tmp_path: Path) -> None:
    """Copies, files and links beside checkpoints, under names that resemble theirs; also in ``best``."""
    older, newer = checkpoints(run)
    roots = [older.parent, run / "best"]
    for root in roots:
        for name in FOREIGN:
            shutil.copytree(older, root / name)
        (root / "step-99999999").write_text("a file")
        (root / "step-00000006-link").symlink_to(older)
        (root / ".step-00000003.partial").symlink_to(older)
    shutil.copytree(newer, run / "best" / newer.name)
    before = {root: contents_of(root) for root in roots}
    assert "DAMAGED" not in succeed(1, "inspect", run)[0].out
    succeed(1, "evaluate", run)
    succeed(1, "train", "--resume", run, f"train.max_steps={STEPS + 6}", "train.checkpoint_every=2")
    for root in roots:
        now = contents_of(root)
        kept = [name for name in before[root] if not name.startswith((f"{older.name}/", f"{newer.name}/"))]
        assert kept
        assert [name for name in kept if now.get(name) != before[root][name]] == []
    steps = [path.name for path in complete_directories(checkpoints_of(run))]
    assert steps == [f"step-{step:08d}" for step in (STEPS + 4, STEPS + 6)]


def test_a_copy_that_is_named_is_read(run: Path) -> None:
    _, newer = checkpoints(run)
    shutil.copytree(newer, newer.with_name("step-00000008-backup"))
    assert succeed(1, "evaluate", newer.with_name("step-00000008-backup"))[0].out


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(run: Path, tmp_path: Path) -> None:
    """Here because it is a link to another disk; said once, however many saves follow."""
    older, _ = checkpoints(run)
    elsewhere = tmp_path / "elsewhere"
    older.rename(elsewhere)
    older.symlink_to(elsewhere)
    before = contents_of(elsewhere)
    options = [f"train.max_steps={STEPS + 6}", "train.checkpoint_every=2", "train.checkpoint_failures_allowed=0"]
    (outcome,) = succeed(1, "train", "--resume", run, *options)
    assert outcome.err.count(str(older)) == 1
    assert "warning: the old checkpoint" in outcome.err
    assert contents_of(elsewhere) == before
    assert [path.name for path in complete_directories(checkpoints_of(run))] == [
        older.name,
        *(f"step-{step:08d}" for step in (STEPS + 4, STEPS + 6)),
    ]


def test_what_stands_in_the_place_of_a_checkpoint_is_kept(run: Path, tmp_path: Path) -> None:
    """A file, a link to an intact checkpoint of a step that is done again, and a file where one is being written."""
    older, newer = checkpoints(run)
    newer.rename(tmp_path / "elsewhere")
    newer.symlink_to(tmp_path / "elsewhere")
    (older / "dense.safetensors").rename(older / "away")  # so that the run goes on from the link
    ahead = newer.with_name(f"step-{STEPS + 2:08d}")
    ahead.write_text("mine")
    ahead.with_name(f".{ahead.name}.partial").write_text("mine too")
    (outcome,) = succeed(1, "train", "--resume", run, f"train.max_steps={STEPS + 2}")
    assert ahead.is_dir()
    assert ahead.with_name(f"{ahead.name}.replaced").read_text() == "mine"
    assert ahead.with_name(f".{ahead.name}.partial.replaced").read_text() == "mine too"
    assert str(ahead.with_name(f"{ahead.name}.replaced")) in outcome.err
    assert (tmp_path / "elsewhere" / "dense.safetensors").is_file()


def test_a_link_to_a_step_that_is_done_again_is_kept(run: Path, tmp_path: Path) -> None:
    _, newer = checkpoints(run)
    newer.rename(tmp_path / newer.name)
    newer.symlink_to(tmp_path / newer.name)
    before = contents_of(tmp_path / newer.name)
    assert len(drop_after(checkpoints_of(run), EVERY)) == 1
    assert newer.with_name(f"{newer.name}.replaced").is_symlink()
    assert contents_of(tmp_path / newer.name) == before


def test_an_unreadable_old_checkpoint_is_not_removed(run: Path) -> None:
    older, _ = checkpoints(run)
    (older / "manifest.json").write_text("torn")
    before = contents_of(older)
    (outcome,) = succeed(1, "train", "--resume", run, f"train.max_steps={STEPS + 2}", "train.keep_checkpoints=1")
    assert contents_of(older) == before
    assert outcome.err.count(str(older)) >= 1


def test_checkpoints_on_another_disk(run: Path, tmp_path: Path) -> None:
    """The directory of checkpoints is a link."""
    _, newer = checkpoints(run)
    checkpoints_of(run).rename(tmp_path / "disk")
    checkpoints_of(run).symlink_to(tmp_path / "disk")
    succeed(1, "evaluate", newer)
    succeed(1, "train", "--resume", run, f"train.max_steps={STEPS + 2}", "train.keep_checkpoints=1")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [f"step-{STEPS + 2:08d}"]


def test_more_steps_than_can_be_counted(refused: Refused, tmp_path: Path, config: Path) -> None:
    start = ["train", "--run-dir", tmp_path / "run", config]
    refused([*start, "train.max_steps=100000000"], "train.max_steps")
    many = ["train.max_steps=null", "train.batch_size=1", "train.epochs=1e6"]
    refused([*start, *many], "train.epochs=1e+06", "99,999,999")


def test_no_checkpoint_at_all(refused: Refused, run: Path) -> None:
    shutil.rmtree(checkpoints_of(run))
    refused(["train", "--resume", run], str(run), "checkpoint", "--run-dir")
    refused(["evaluate", run], str(run), "checkpoint")


def test_a_directory_that_is_no_run(refused: Refused, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        refused(["train", "--resume", directory], str(directory), "not a run directory")
        refused(["evaluate", directory], str(directory), "not a run directory")


def test_a_run_directory_that_is_used(refused: Refused, run: Path, config: Path) -> None:
    before = sorted(path for path in run.rglob("*") if path.is_file())
    refused(["train", "--run-dir", run, config], f"--run-dir {run}", f"--resume {run}")
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


def test_checkpoints_of_a_run_without_its_configuration(refused: Refused, run: Path, config: Path) -> None:
    """A new run there would remove them."""
    (run / "config.yaml").unlink()
    before = contents_of(run)
    refused(["train", "--run-dir", run, config], f"--run-dir {run}", "checkpoints", "config.yaml")
    assert contents_of(run) == before


def test_a_run_directory_that_cannot_be_made(refused: Refused, tmp_path: Path, config: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(["train", "--run-dir", tmp_path / "file" / "run", config], "--run-dir", str(tmp_path / "file"))


def test_what_was_refused_leaves_no_run_behind(refused: Refused, tmp_path: Path, config: Path) -> None:
    refused(["train", "--run-dir", tmp_path / "run", config, "model.gate.k=99"], "model.gate.k=99")
    assert not (tmp_path / "run").exists()


def test_resume_with_a_wrong_override(refused: Refused, run: Path) -> None:
    refused(["train", "--resume", run, "model.gate.k=99"], "model.gate.k=99", "num_experts=4")
    refused(["train", "--resume", run, "train.max_stepz=9"], "did you mean train.max_steps?")


def test_resume_with_an_optimizer_or_schedule_that_cannot_go_on(refused: Refused, run: Path) -> None:
    optimizer, schedule = (
        "deepspeed.optimizer.params.amsgrad=true",
        "{type: OneCycleLR, params: {max_lr: 1, total_steps: 3}}",
    )
    refused(["train", "--resume", run, optimizer], "deepspeed.optimizer.type", "cannot go on from", "max_exp_avg_sq")
    refused(
        ["train", "--resume", run, f"deepspeed.scheduler={schedule}"], "OneCycleLR ends after 3 steps", "total_steps"
    )


def test_a_configuration_of_the_run_that_was_altered(refused: Refused, run: Path) -> None:
    (run / "config.yaml").write_text("model: {dropout: [")
    refused(["train", "--resume", run], str(run / "config.yaml"), "not YAML")
    refused(["evaluate", run], str(run / "config.yaml"), "not YAML")
