"""Forests that are trained: at any number of ranks, with no word between branches, killed and resumed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.cli.main import main
from dist_moe.engine.checkpoint import newest_checkpoint
from dist_moe.engine.checkpoint.format import read_trainer_state
from dist_moe.engine.health.heartbeats import collectives_issued
from dist_moe.engine.training import Trainer
from dist_moe.recipes.branch_train_merge import Forest, recipe, training
from dist_moe.recipes.stages import Stage
from tests.helpers.commands import finish, start, succeed
from tests.helpers.forests import HELD_OUT, OFTEN, SEED_STEPS, STEPS, TRAINED_ON, write_forest_config
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of

WORLDS = {1: 1, 2: 1, 4: 2}
"""Expert-parallel size by number of ranks: of four, each branch has two."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_forest_config(tmp_path_factory.mktemp("forest"), recipe={"twin": True}, train=OFTEN)


def train_watched(config: str, run: str, ep: int) -> dict[str, Any]:
    """Train, and return for each model: collectives of this rank while it was trained, sizes of all groups, peers."""
    seen: dict[str, Any] = {}
    original = training.fit_model

    def watched(plan: Any, stage: Stage, *arguments: Any, **options: Any) -> Any:
        peers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peers, int(os.environ["RANK"]))
        before = collectives_issued()
        result = original(plan, stage, *arguments, **options)
        members = [sorted(ranks) for ranks in distributed_c10d._world.pg_group_ranks.values()]
        seen[stage.run.root.name] = {"issued": collectives_issued() - before, "members": members, "peers": peers}
        return result

    training.fit_model = watched
    try:
        assert main(["train", "--run-dir", run, config, f"parallel.expert_parallel_size={ep}"]) == 0
    finally:
        training.fit_model = original
    return seen


@pytest.fixture(scope="module")
def watched(config: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what each rank saw."""
    runs = {world: str(config.parent / f"world{world}") for world in WORLDS}
    return {w: on_ranks(w, train_watched, str(config), runs[w], ep) for w, ep in WORLDS.items()}


@pytest.fixture(scope="module")
def run(config: Path, watched: object) -> Path:
    return config.parent / "world1"


def test_ranks_1_2_and_4_give_the_same_forest(config: Path, watched: object) -> None:
    alone = Forest(config.parent / "world1")
    assert list(alone.members) == ["seed", "twin", *TRAINED_ON]
    for world in (2, 4):
        forest = Forest(config.parent / f"world{world}")
        assert list(forest.members) == list(alone.members)
        for name in forest.members:
            ours, theirs = forest.weights(name), alone.weights(name)
            for parameter in theirs:
                torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-4, atol=1e-5)
        tables = [json.loads((f.root / "evaluation.json").read_text())["bits_per_byte"] for f in (forest, alone)]
        for label, row in tables[1].items():
            assert tables[0][label] == pytest.approx(row, rel=1e-4)


def test_no_collective_leaves_the_ranks_of_a_branch(watched: dict[int, list[dict[str, Any]]]) -> None:
    """While a branch is trained, its processes have no group in which there is anyone else."""
    for rank, seen in enumerate(watched[2]):
        assert seen["seed"]["issued"] > 0
        assert (0, 1) in {tuple(group) for group in seen["seed"]["members"]}
        (mine,) = (name for name in seen if name.startswith("branch-"))
        assert mine == f"branch-{TRAINED_ON[rank]}"
        assert seen[mine]["peers"] == [rank]
        assert {tuple(group) for group in seen[mine]["members"]} == {(0,)}  # DeepSpeed's own, with itself alone
    for rank, seen in enumerate(watched[4]):
        (mine,) = (name for name in seen if name.startswith("branch-"))
        assert mine == f"branch-{TRAINED_ON[rank // 2]}"
        assert seen[mine]["peers"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert seen[mine]["issued"] > 0  # of its own: experts are split over two ranks
        assert all(set(group) <= {0, 1} for group in seen[mine]["members"])  # numbers within the branch
        assert any(len(group) == 4 for group in seen["seed"]["members"])


def test_a_branch_goes_on_with_the_seeds_optimizer_and_schedule(run: Path) -> None:
    for name in TRAINED_ON:
        records = records_of(run / "stages" / f"branch-{name}")
        assert [record["step"] for record in records] == list(range(SEED_STEPS + 1, STEPS + 1))
        state, twin = (read_trainer_state(newest_checkpoint(run / "stages" / s)) for s in (f"branch-{name}", "twin"))
        assert state.schedule_steps == twin.schedule_steps == STEPS
        assert state.scalars == twin.scalars != {}  # Adam's count of steps
    forest = Forest(run)
    result = json.loads((run / "stages" / "forest" / "result.json").read_text())
    assert result["tokens"]["forest"] == result["tokens"]["twin"] == STEPS * 8 * 16
    assert sum(m.tokens for m in forest.members.values() if m.role != "twin") == result["tokens"]["twin"]


def test_the_twin_is_a_run_without_branches(config: Path, run: Path) -> None:
    """The seed and its continuation are, bit for bit, one undisturbed dense run of the whole budget."""
    whole = config.parent / "whole"
    succeed(1, "train", "--run-dir", whole, config, "recipe.seed_share=1.0", "recipe.twin=false")
    assert list(Forest(whole).members) == ["seed"]
    ours, theirs = Forest(run).weights("twin"), Forest(whole).weights("seed")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_experts_are_specialists_and_the_table_has_every_domain(run: Path) -> None:
    report = json.loads((run / "forest" / "evaluation.json").read_text())
    table = report["bits_per_byte"]
    assert report["trained_on"] == list(TRAINED_ON)
    assert report["held_out"] == [HELD_OUT]
    for name, other in zip(TRAINED_ON, reversed(TRAINED_ON), strict=True):
        assert table[name][name] < table[other][name]
        assert table[name][name] < table["seed"][name]
    for label, row in table.items():
        assert set(row) == {*TRAINED_ON, HELD_OUT, "all trained on", "all held out"}, label
    for label, weights in report["weights"].items():
        for domain, by_expert in weights.items():
            assert sum(by_expert.values()) == pytest.approx(1, abs=1e-9), (label, domain)
    cached = report["weights"]["ensemble, prior cached"]
    assert all(cached[name][name] > 0.5 for name in TRAINED_ON)
    assert report["experts_per_token"]["ensemble"] == 2
    assert report["experts_per_token"]["average"] == 1
    flops = report["flops_per_token"]
    assert flops["ensemble"] == pytest.approx(sum(flops[name] for name in TRAINED_ON))
    assert flops["average"] == pytest.approx(flops["seed"], rel=0.1), "trees that harden: experts per token vary"
    assert len({flops[name] for name in (*TRAINED_ON, "seed", "average")}) > 1, "as measured, not as configured"
    assert (run / "forest" / "evaluation.md").read_text().count("\n") >= len(table) + 2
    assert (run / "forest" / "weights.png").read_bytes().startswith(b"\x89PNG")


STAGES = ("seed", f"branch-{TRAINED_ON[1]}", "twin", "forest", "evaluation")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage_and_resumed(config: Path, run: Path, tmp_path: Path, stage: str) -> None:
    """Every model is that of the undisturbed run, bit for bit, and what had finished is not done again."""
    killed = tmp_path / "run"
    on_ranks(1, train_and_die, str(config), str(killed), stage)
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("stages/*/result.json")}
    assert [name for name in STAGES if killed / "stages" / name / "result.json" in finished] == [
        *STAGES[: STAGES.index(stage)]
    ]
    if stage not in ("forest", "evaluation"):
        before = {"seed": 0}.get(stage, SEED_STEPS)
        assert newest_checkpoint(killed / "stages" / stage).name == f"step-{before + 2:08}"
    succeed(1, "train", "--resume", killed)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents_of(killed) == contents_of(run)
    for trained in ("seed", "twin", *(f"branch-{name}" for name in TRAINED_ON)):
        assert losses_of(killed / "stages" / trained).equal(losses_of(run / "stages" / trained))
    assert (killed / "forest" / "evaluation.md").read_text() == (run / "forest" / "evaluation.md").read_text()


def train_and_die(config: str, run: str, stage: str) -> None:
    """Train until the middle of a stage, where it fails as a process that is killed would: nothing more is written."""

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(self, Forest) or (self.run.root.name == stage and self.step % SEED_STEPS == 3):
            raise RuntimeError("killed")
        return original(self, *arguments, **options)

    owner: Any = Trainer
    name = "_settle_step"
    if stage == "forest":
        owner, name = Forest, "_write"  # the first file is there, and no manifest yet
    elif stage == "evaluation":
        owner, name = recipe, "write_report"
    original = getattr(owner, name)
    setattr(owner, name, fail)
    try:
        with pytest.raises(RuntimeError, match="killed"):
            main(["train", "--run-dir", run, config])
    finally:
        setattr(owner, name, original)


def contents_of(run: Path) -> dict[str, str]:
    """Digests of the values of a forest's models."""
    forest = Forest(run)
    return {name: forest.weights(name).content_digest() for name in forest.members}


KILLER = """
import os, signal
from pathlib import Path
from typing import Literal
from dist_moe.engine.callbacks import CALLBACKS, Callback, CallbackSettings

class Killer(Callback):
    def after_step(self, trainer, step):
        marker = Path("killed")
        if trainer.run.root.name == "branch-sailing" and step == 9 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

@CALLBACKS.register
class KillerConfig(CallbackSettings):
    name: Literal["killer"] = "killer"
    def build(self):
        return Killer()
"""


@pytest.mark.slow
def test_the_death_of_one_branch_changes_no_bit_of_another(config: Path, watched: object, tmp_path: Path) -> None:
    """Two processes, a branch each; one of them is killed, and the run resumed."""
    (tmp_path / "killer.py").write_text(KILLER)
    command = (sys.executable, "-m", "dist_moe", "train", "--emulate", 2)
    more = ("imports=[killer]", "callbacks=[{name: killer}]")
    assert finish(start(*command, "--run-dir", "run", config, *more, cwd=tmp_path)).code != 0
    assert (tmp_path / "killed").exists()
    assert not (tmp_path / "run" / "stages" / "branch-sailing" / "result.json").exists()
    resumed = finish(start(*command, "--resume", "run", cwd=tmp_path))
    assert resumed.code == 0, resumed.err
    assert contents_of(tmp_path / "run") == contents_of(config.parent / "world2")
