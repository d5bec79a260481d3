"""What is done to a forest afterwards: add, replace, drop, evaluate, generate; nobody else's bits change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.config.files import read_json
from dist_moe.engine.checkpoint import newest_checkpoint, read_model
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.training import Trainer
from dist_moe.recipes.branch_train_merge import Forest, tend
from dist_moe.recipes.branch_train_merge.evaluate import evaluate_run
from dist_moe.recipes.branch_train_merge.merge import Average, Ensemble, MergeSettings
from dist_moe.recipes.branch_train_merge.partition import task_of_domain
from dist_moe.recipes.branch_train_merge.scoring import Scorer, new_model
from dist_moe.recipes.branch_train_merge.tend import open_run
from dist_moe.recipes.stages import Interrupted
from dist_moe.tasks import build_model
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.forests import HELD_OUT, OFTEN, TRAINED_ON, write_forest_config
from tests.helpers.pool import on_ranks

FIRST, SECOND = TRAINED_ON


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_forest_config(tmp_path_factory.mktemp("tended"), train=OFTEN)
    succeed(1, "train", "--run-dir", config.parent / "run", config)
    return config.parent / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def files_of(run: Path) -> dict[str, bytes]:
    """The bytes of every model's file, by the model's name."""
    forest = Forest(run)
    return {name: forest.path(name).read_bytes() for name in forest.members}


def forest(*arguments: object) -> str:
    """``dist-moe forest ARGUMENTS`` on one rank; what was printed."""
    return succeed(1, "forest", *arguments)[0].out


def refused(*arguments: object) -> str:
    outcome = dist_moe(1, "forest", *arguments)[0]
    assert outcome.code == 2
    return outcome.err


@pytest.mark.parametrize("begin", ["average", "nearest", "seed"])
def test_an_expert_of_a_further_domain(run: Path, begin: str) -> None:
    before = files_of(run)
    assert "now: dist-moe forest evaluate" in forest("add", run, HELD_OUT, "--from", begin)
    after = files_of(run)
    assert {name: content for name, content in after.items() if name != HELD_OUT} == before
    assert Forest(run).experts == (*TRAINED_ON, HELD_OUT)
    assert Forest(run).members[HELD_OUT].begun_from == begin
    report = json.loads(forest("evaluate", run, "--json", "--domains", HELD_OUT))
    assert report["trained_on"] == [HELD_OUT]
    on_it = {label: row[HELD_OUT] for label, row in report["bits_per_byte"].items()}
    assert on_it[HELD_OUT] < min(on_it[FIRST], on_it[SECOND], on_it["seed"])
    forest("drop", run, HELD_OUT)
    assert files_of(run) == before
    assert len(list((run / "forest").glob("*.safetensors"))) == len(before)


def first_weights(run: str, begin_from: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights with which a further expert's training begins, and the prior of its domain."""
    begun: dict[str, torch.Tensor] = {}
    priors: list[float] = []

    def look(plan: Any, stage: Any, task: Any, settings: Any, *, begin: Any) -> dict[str, Any]:
        model = build_model(plan.start.config, plan.union, stage.groups.world)
        begin(model)
        begun.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        domains, place = {HELD_OUT: task}, Forest(Path(run))
        scorer = Scorer(new_model(plan, stage.groups), plan.union, domains, place, stage.groups, plan.prior)
        priors.extend(scorer.prior(HELD_OUT, "all").tolist())
        raise Interrupted(15)

    original, tend.fit_model = tend.fit_model, look
    try:
        assert tend.add_expert(Path(run), HELD_OUT, begin_from) == 128 + 15
    finally:
        tend.fit_model = original
    return begun, priors


def test_a_further_expert_begins_from_the_average_or_the_nearest(run: Path) -> None:
    weights = [Forest(run).weights(name) for name in TRAINED_ON]
    ((begun, prior_J),) = on_ranks(1, first_weights, str(run), "average")
    assert sum(prior_J) == pytest.approx(1)
    assert 0 < min(prior_J) < max(prior_J)
    for name, value in begun.items():
        expected = sum(share * of[name].double() for share, of in zip(prior_J, weights, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    ((begun, _),) = on_ranks(1, first_weights, str(run), "nearest")
    nearest = weights[prior_J.index(max(prior_J))]
    assert all(value.equal(nearest[name]) for name, value in begun.items())


def add_and_die(run: str) -> None:
    """Add an expert, and fail in the middle of its training."""
    original = Trainer._settle_step

    def fail(self: Trainer) -> bool:
        if self.step == 3:
            raise RuntimeError("killed")
        return original(self)

    Trainer._settle_step = fail  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="killed"):
            tend.add_expert(Path(run), HELD_OUT, "average")
    finally:
        Trainer._settle_step = original  # type: ignore[method-assign]


def test_an_addition_that_was_killed_goes_on(run: Path, trained: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(trained, tmp_path / "whole"))
    forest("add", whole, HELD_OUT)
    on_ranks(1, add_and_die, str(run))
    assert Forest(run).experts == TRAINED_ON
    (stage,) = run.glob(f"stages/added-*-{HELD_OUT}")
    assert newest_checkpoint(stage).name == "step-00000002"
    forest("add", run, HELD_OUT)
    assert Forest(run).weights(HELD_OUT).content_digest() == Forest(whole).weights(HELD_OUT).content_digest()


def test_an_addition_is_the_same_on_two_ranks(run: Path, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    forest("add", run, HELD_OUT)
    succeed(2, "forest", "add", other, HELD_OUT)
    ours, theirs = (Forest(place).weights(HELD_OUT) for place in (run, other))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_one_that_is_added_again_is_trained_again(run: Path) -> None:
    forest("add", run, HELD_OUT)
    once = Forest(run).weights(HELD_OUT).content_digest()
    forest("drop", run, HELD_OUT)
    forest("add", run, HELD_OUT)
    assert Forest(run).weights(HELD_OUT).content_digest() == once
    assert len(list(run.glob(f"stages/added-*-{HELD_OUT}"))) == 2


def test_a_trained_expert_takes_the_place_of_one(run: Path, trained: Path) -> None:
    before = files_of(run)
    other = trained / "forest" / Forest(trained).members[SECOND].file
    forest("replace", run, FIRST, "--from", other)
    after = files_of(run)
    assert {name for name in before if before[name] != after[name]} <= {FIRST}
    assert Forest(run).weights(FIRST).content_digest() == Forest(run).weights(SECOND).content_digest()
    assert Forest(run).experts == TRAINED_ON
    report = json.loads(forest("evaluate", run, "--json", "--with", "ensemble", "average"))
    table = report["bits_per_byte"]
    for domain, value in table[SECOND].items():  # two copies of one model, however they are used together
        assert table["ensemble"][domain] == pytest.approx(value, rel=1e-12)
        assert table["average"][domain] == value
    forest("replace", run, FIRST, "--from", "seed")  # a branch as it was trained at first
    weights, first = Forest(run).weights(FIRST), read_model(newest_checkpoint(trained / "stages" / f"branch-{FIRST}"))
    assert all(weights[name].equal(first[name]) for name in first)


def test_the_table_of_chosen_experts_and_domains(run: Path) -> None:
    printed = forest("evaluate", run, "--experts", FIRST, "--domains", FIRST, HELD_OUT, "--with", "ensemble")
    assert printed.strip() == (run / "forest" / "evaluation.md").read_text().strip()
    report = read_json(run / "forest" / "evaluation.json")
    table = report["bits_per_byte"]
    assert list(table) == [FIRST, "seed", "ensemble"]
    assert table["ensemble"] == table[FIRST]  # an ensemble of one
    assert set(table[FIRST]) == {FIRST, HELD_OUT, "all trained on", "all held out"}
    assert table[FIRST]["all trained on"] == table[FIRST][FIRST]


def test_it_is_listed(run: Path) -> None:
    lines = forest("list", run).splitlines()
    assert [line.split()[0] for line in lines] == ["name", "seed", *TRAINED_ON]
    listed = json.loads(forest("list", run, "--json"))["members"]
    assert [one["role"] for one in listed] == ["seed", "expert", "expert"]


def test_generation_is_drawn_from_the_mixture(run: Path) -> None:
    text = forest("generate", run, "stir the soup", "--tokens", 12)
    assert text == forest("generate", run, "stir the soup", "--tokens", 12)
    assert text != forest("generate", run, "stir the soup", "--tokens", 12, "--seed", 1)
    alone = forest("generate", run, "stir the soup", "--tokens", 12, "--with", "average")
    cached = forest("generate", run, "stir", "--with", "{name: ensemble, prior: cached, top_k: 1}", "--domain", FIRST)
    assert all(written.strip() for written in (text, alone, cached))
    assert "name one by --domain" in refused("generate", run, "stir", "--with", "{name: ensemble, prior: cached}")


def test_what_cannot_be_done_is_refused(run: Path, tmp_path: Path) -> None:
    assert f"has {FIRST} already" in refused("add", run, FIRST)
    assert f"has no expert {HELD_OUT}; it has {FIRST}, {SECOND}" in refused("drop", run, HELD_OUT)
    assert "has no expert seed" in refused("replace", run, "seed")
    assert "knitting is no domain of the data and no branch of the run" in refused("add", run, "knitting")
    assert "there is no domain knitting" in refused("evaluate", run, "--domains", "knitting")
    assert "there is no expert knitting" in refused("evaluate", run, "--experts", "knitting")
    assert "merge.name='blend' is not a merge" in refused("evaluate", run, "--with", "blend")
    assert "is not a run directory" in refused("list", tmp_path / "nothing")
    evaluated = dist_moe(1, "evaluate", run)[0]
    assert evaluated.code == 2
    assert "is a forest, not one model" in evaluated.err
    path = Forest(run).path(SECOND)
    path.write_bytes(Forest(run).path(FIRST).read_bytes())
    assert f"is not the file that was written for {SECOND}" in refused("evaluate", run)
    path.unlink()
    assert f"is gone, the weights of {SECOND}" in refused("evaluate", run)
    forest("drop", run, SECOND)
    assert Forest(run).experts == (FIRST,)


def test_an_expert_is_evaluated_alone_from_its_file_and_from_its_stage(trained: Path) -> None:
    """By the command for single models, to the figures of the table."""
    table = read_json(trained / "forest" / "evaluation.json")["bits_per_byte"][FIRST]
    for place in (Forest(trained).path(FIRST), trained / "stages" / f"branch-{FIRST}"):
        test = json.loads(succeed(1, "evaluate", "--json", place)[0].out)["test"]
        for domain in (*TRAINED_ON, HELD_OUT):
            assert test[f"bits_per_byte_{domain}"] == pytest.approx(table[domain], rel=1e-9)


MERGES: tuple[MergeSettings, ...] = (
    Ensemble(name="ensemble"),
    Ensemble(name="ensemble", history="previous"),
    Ensemble(name="ensemble", prior="cached"),
    Ensemble(name="ensemble", prior="cached", top_k=1),
    Average(name="average"),
    Average(name="average", weights="cached"),
)


def scores_and_modules(run: str) -> list[tuple[str, float, float, float]]:
    """By way of merging: the largest difference between its scores and what its module predicts, and of sums from 1."""
    plan, found = open_run(Path(run)), []
    with process_groups(plan.start.environment, ParallelConfig()) as groups:
        domains = {FIRST: task_of_domain(plan.task, FIRST)}
        scorer = Scorer(new_model(plan, groups), plan.union, domains, Forest(Path(run)), groups, plan.prior)
        tokens_NS = scorer.tokens(FIRST)
        target_NS1 = torch.cat([batch.target_BS for batch in scorer._batches(scorer.table(FIRST))]).unsqueeze(2)
        for merge in MERGES:
            scores = merge.score(scorer, FIRST)
            model = merge.model(scorer, FIRST, lambda: new_model(plan, groups)).eval()
            with torch.no_grad():
                logp_NSV = model(tokens_NS).predictions[0].double().log_softmax(-1)
                sums_NS = model(tokens_NS).predictions[0].double().exp().sum(-1)
            logp_NS = logp_NSV.gather(2, target_NS1).squeeze(2)
            off = float((sums_NS - 1).abs().max()) if isinstance(merge, Ensemble) else 0.0
            found.append((merge.label, float((logp_NS - scores.logp_NS).abs().max()), off, scores.experts_per_token))
    return found


def test_scores_are_those_of_the_module_that_predicts(trained: Path) -> None:
    (found,) = on_ranks(1, scores_and_modules, str(trained))
    assert len({label for label, *_ in found}) == len(MERGES)
    for label, difference, off, _ in found:
        assert difference < 1e-5, label
        assert off < 1e-12, label
    assert [active for *_, active in found] == [2, 2, 2, 1, 1, 1]


def evaluate_on_ranks(run: str) -> dict[str, Any]:
    plan = open_run(Path(run))
    with process_groups(plan.start.environment, ParallelConfig()) as groups:
        return evaluate_run(plan, groups, MERGES)


def test_the_table_is_the_same_at_any_number_of_ranks(trained: Path) -> None:
    (alone,) = on_ranks(1, evaluate_on_ranks, str(trained))
    for report in on_ranks(2, evaluate_on_ranks, str(trained)):
        for label, row in alone["bits_per_byte"].items():
            assert report["bits_per_byte"][label] == pytest.approx(row, rel=1e-6), label
