"""Changed data that are let pass are recorded wherever a run speaks; what a run stems from is known by its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.engine.checkpoint import newest_checkpoint
from dist_moe.engine.checkpoint.loading import read_trainer_state
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import plan_new_run, plan_restartable_run, plan_resumed_run
from dist_moe.recipes.supervised.evaluate import evaluate_run
from dist_moe.recipes.supervised.runs import digest_of_weights, export_weights, import_weights, reshard_run
from tests.data.labelled_text.tiny_texts import write_messages
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.runs import summary_of, write_config
from tests.helpers.text_runs import taught, write_encoder, write_text_config

STEPS = {"max_steps": 2, "epochs": 9, "batch_size": 16, "log_every": 1}
OPTION = "--allow-changed-data"


def one_rating_more(root: Path) -> None:
    with (root / "ratings.dat").open("ab") as file:
        file.write(b"500::1::5::9\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its data and its configuration."""
    directory: Path = tmp_path_factory.mktemp("ratings")
    root = write_tiny_movielens(directory / "raw", users=40, items=30)
    config = write_config(directory, {"root": str(root), "cache": str(directory / "cache")}, train=STEPS)
    succeed(1, "train", config, "--run-dir", directory / "run")
    return directory


def identity_of(run: Path) -> Any:
    return json.loads((run / "identity.json").read_text())


def test_what_is_let_pass_is_recorded(trained: Path, tmp_path: Path) -> None:
    """A run of users that are not more: its model can be loaded."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    root = write_tiny_movielens(tmp_path / "other", users=40, items=30, seed=5)
    place = f"data.root={root}"
    (refused,) = dist_moe(1, "train", "--resume", run, place, "train.max_steps=3")
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith(f"dist-moe: {run}: the prepared data of part train, ")
    before = identity_of(run)
    (passed,) = succeed(1, "train", "--resume", run, place, "train.max_steps=3", OPTION)
    assert "changed since the run was trained; going on by --allow-changed-data" in passed.err + passed.out
    (change,) = summary_of(run)["data_changes"]
    assert (change["step"], set(change["changed"])) == (2, {"train", "val", "test"})
    assert change["before"] == {part: before["data"][part] for part in change["changed"]}
    now = identity_of(run)
    assert now["changes"] == [change]
    assert read_trainer_state(newest_checkpoint(run)).identity == now
    # From here on the run is one of the new data, and says what it was before.
    assert plan_resumed_run(run, []).identity.plain() == now
    with pytest.raises(UserError, match="prepared data of part train"):
        plan_resumed_run(run, [f"data.root={trained / 'raw'}"])


def test_figures_of_changed_data_say_so(trained: Path, tmp_path: Path) -> None:
    root, kept = trained / "raw", tmp_path / "kept"
    shutil.copytree(root, kept)
    write_tiny_movielens(root, users=40, items=30, seed=5)
    try:
        (refused,) = dist_moe(1, "evaluate", trained / "run", "--json")
        assert (refused.code, refused.out) == (2, "")
        (found,) = succeed(1, "evaluate", trained / "run", "--json", OPTION)
        assert set(json.loads(found.out)["changed_data"]) == {"train", "val", "test"}
        assert "going on by --allow-changed-data" in found.err
        searched = tmp_path / "searched"
        succeed(1, "search", trained / "run", "--output", searched, "max_swaps=1", OPTION)
        report = json.loads((searched / "swap_search.json").read_text())
        assert set(report["changed_data"]) == {"train", "val", "test"}
    finally:
        shutil.rmtree(root)
        shutil.move(kept, root)
    (found,) = succeed(1, "evaluate", trained / "run", "--json")
    assert json.loads(found.out)["changed_data"] == []
    assert json.loads(found.out)["test"] == summary_of(trained / "run")["test"]
    assert "digests" not in found.err


def test_copies_exports_and_imports_know_their_data(trained: Path, tmp_path: Path) -> None:
    """Wherever the weights are: a copied run, one in other files, an exported file, and a run that starts from it."""
    exported = export_weights(trained / "run", tmp_path / "weights.safetensors", torch.float32)
    assert exported.path is not None
    import_weights(exported.path, tmp_path / "imported")
    reshard_run(trained / "run", tmp_path / "resharded", 2)
    import_weights(exported.path, tmp_path / "elsewhere", [f"data.root={write_tiny_movielens(tmp_path / 'data')}"])
    stems = [exported.path, tmp_path / "imported", tmp_path / "resharded"]
    assert {digest_of_weights(path) for path in stems} == {digest_of_weights(trained / "run")}
    root, kept = trained / "raw", tmp_path / "kept"
    shutil.copytree(root, kept)
    one_rating_more(root)
    try:
        for path in stems:
            with pytest.raises(UserError, match=r"part test.*vocabulary or sizes.* changed since it was trained"):
                evaluate_run(path)
        with pytest.raises(UserError, match="changed since it was trained"):
            plan_resumed_run(tmp_path / "imported", [])
    finally:
        shutil.rmtree(root)
        shutil.move(kept, root)
    for path in (tmp_path / "imported", tmp_path / "elsewhere"):
        warnings = plan_resumed_run(path, []).start.warnings
        assert not any("digests" in line for line in warnings)


def test_a_run_before_its_first_checkpoint_begins_again_with_the_same_data_only(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "best"))
    config = trained / "config.yaml"
    assert plan_restartable_run(config, [], run).identity.plain() == identity_of(run)
    place = f"data.root={write_tiny_movielens(tmp_path / 'other', users=40, items=30, seed=5)}"
    with pytest.raises(UserError, match=r"part train.*--allow-changed-data"):
        plan_restartable_run(config, [place], run)
    (change,) = plan_restartable_run(config, [place], run, allow_changed_data=True).identity.changes
    assert change.step == 0


def test_what_is_not_known_is_said_and_a_damaged_record_is_refused(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    for text in ("[1, 2", "[1, 2]", '{"data": {"train": 5}}', '{"other": 1}'):
        (run / "identity.json").write_text(text)
        with pytest.raises(UserError, match=r"identity\.json (cannot be read|says nothing readable).*put back"):
            plan_restartable_run(trained / "config.yaml", [], run)
    shutil.copytree(trained / "run" / "checkpoints", run / "checkpoints")
    assert plan_resumed_run(run, []).start.warnings == []  # the checkpoint carries it as well


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two teachers of one task and split, and a student that starts from and follows the first."""
    directory: Path = tmp_path_factory.mktemp("texts")
    encoder = write_encoder(directory / "encoder")
    data = {"name": "sms-spam", "root": str(write_messages(directory / "raw"))}
    config = write_text_config(directory, encoder, data, train=STEPS)
    for seed in (0, 1):
        succeed(1, "train", config, "--run-dir", directory / f"teacher-{seed}", f"seed={seed}")
    succeed(1, "train", config, "--run-dir", directory / "student", *taught(directory / "teacher-0"))
    return directory


def test_teacher_and_start_are_known_by_their_weights(texts: Path, tmp_path: Path) -> None:
    student, other = texts / "student", texts / "teacher-1"
    assert set(identity_of(student)["weights"]) == {"start", "teacher"}
    exported = export_weights(texts / "teacher-0", tmp_path / "teacher.safetensors", torch.float32).path
    for same in (shutil.copytree(texts / "teacher-0", tmp_path / "moved"), exported):
        assert plan_resumed_run(student, [f"recipe.teacher={same}", f"start.run={same}"]).checkpoint
    with pytest.raises(UserError, match="student: the teacher changed since it was trained"):
        plan_resumed_run(student, [f"recipe.teacher={other}"])
    with pytest.raises(UserError, match="student: the start weights changed since it was trained"):
        plan_resumed_run(student, [f"start.run={other}"])
    plan = plan_resumed_run(student, [f"recipe.teacher={other}"], allow_changed_data=True)
    assert [change.changed for change in plan.identity.changes] == [("teacher",)]
    assert plan_resumed_run(student, [f"start.run={tmp_path / 'gone'}"]).checkpoint  # its weights are in the checkpoint


def test_an_encoder_of_other_weights_is_another_start(texts: Path, tmp_path: Path) -> None:
    encoder = shutil.copytree(texts / "encoder", tmp_path / "encoder")
    content = bytearray((encoder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (encoder / "model.safetensors").write_bytes(bytes(content))
    place = f"data.encoder={encoder}"
    with pytest.raises(UserError, match="teacher-0: the start weights changed since it was trained"):
        plan_resumed_run(texts / "teacher-0", [place])
    assert plan_resumed_run(texts / "student", [place]).checkpoint  # which started from a run


def test_a_teacher_of_other_tokens_or_of_another_split_is_refused(texts: Path, tmp_path: Path) -> None:
    """With the same sizes, the same name of the task and the same seed."""
    config = texts / "config.yaml"
    encoder = shutil.copytree(texts / "encoder", tmp_path / "encoder")
    tokenizer = json.loads((encoder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (encoder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    raw = shutil.copytree(texts / "raw", tmp_path / "raw")
    with (raw / "sms-spam.csv").open("ab") as file:
        file.write(b"x,1,quite new\r\n")
    for given, what in ((f"data.encoder={encoder}", "tokenizer"), (f"data.root={raw}", "texts and their split")):
        for field, more in (("start.run", []), ("recipe.teacher", ["recipe.name=moebert"])):
            overrides = [given, *more, f"{field}={texts / 'teacher-0'}"]
            with pytest.raises(UserError, match=rf"{field}=.*teacher-0.*{what}"):
                plan_new_run(config, overrides, tmp_path / "run")
    shorter = ["data.max_length=40", f"start.run={texts / 'teacher-0'}"]
    assert plan_new_run(config, shorter, tmp_path / "run")  # cut elsewhere, the same texts and tokens
