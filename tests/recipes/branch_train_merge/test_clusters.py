"""c-BTM: a branch for each discovered domain, and experts that count by the words so far."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.recipes.branch_train_merge import Clusters, Forest
from dist_moe.recipes.branch_train_merge.scoring import Scorer, new_model
from dist_moe.recipes.branch_train_merge.tend import open_run
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.forests import write_forest_config
from tests.helpers.pool import on_ranks

MERGES = (Clusters(name="clusters"), Clusters(name="clusters", top_k=1), Clusters(name="clusters", doubled_square=True))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    merge = [one.model_dump(mode="json") for one in MERGES] + [{"name": "ensemble"}]
    recipe = {"merge": merge, "partition": {"domains": None}}
    model = {"moe_every": 0, "layers": 2}
    root = tmp_path_factory.mktemp("clusters")
    return write_forest_config(root, recipe=recipe, model=model, data={"clusters": {"count": 2}})


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    succeed(1, "train", "--run-dir", config.parent / "run", config)
    return config.parent / "run"


def test_each_cluster_has_an_expert_and_every_column_is_one(run: Path) -> None:
    forest = Forest(run)
    assert forest.experts == ("cluster-0", "cluster-1")
    report = json.loads((forest.root / "evaluation.json").read_text())
    assert report["trained_on"] == ["cluster-0", "cluster-1"]
    assert set(report["bits_per_byte"]) >= {"clusters", "clusters, top_k 1", "clusters, doubled_square True"}
    assert [report["experts_per_token"][merge.label] for merge in MERGES] == [2, 1, 2]
    for domain, weights in report["weights"]["clusters"].items():
        assert sum(weights.values()) == pytest.approx(1)
        assert max(weights, key=lambda name: weights[name]) == domain, "a text's words are those of its own cluster"


def scores_and_modules(run: str) -> list[tuple[float, float]]:
    """By way of merging: how far its scores are from what its module predicts, and sums of probabilities from 1."""
    plan, found = open_run(Path(run)), []
    with process_groups(plan.start.environment, ParallelConfig()) as groups:
        scorer = Scorer(new_model(plan, groups), plan.union, {"all": plan.union}, Forest(Path(run)), groups, plan.prior)
        tokens_NS = scorer.tokens("all")
        table = scorer.table("all")
        target_NS = torch.cat([torch.tensor(row[1:])[None] for row in table.windows(torch.arange(len(table)).numpy())])
        for merge in MERGES:
            model = merge.model(scorer, None, lambda: new_model(plan, groups)).eval()
            with torch.no_grad():
                logp_NSV = model(tokens_NS).predictions[0]
            logp_NS = logp_NSV.gather(2, target_NS.unsqueeze(2)).squeeze(2)
            difference = (logp_NS - merge.score(scorer, "all").logp_NS).abs().max()
            found.append((float(difference), float((logp_NSV.exp().sum(-1) - 1).abs().max())))
    return found


def test_scores_are_those_of_the_module_that_predicts(run: Path) -> None:
    (found,) = on_ranks(1, scores_and_modules, str(run))
    for difference, off in found:
        assert difference < 1e-5
        assert off < 1e-12


def test_text_is_written_by_the_nearest_expert(run: Path) -> None:
    merge = "{name: clusters, top_k: 1}"
    (said,) = succeed(1, "forest", "generate", run, "stir the soup and", "--with", merge, "--tokens", "5")
    assert said.out.strip()


def test_a_table_of_clusters_is_the_same_on_two_ranks(run: Path, tmp_path: Path) -> None:
    """In a copy: the table is written into the forest."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    alone, both = (
        json.loads(succeed(ranks, "forest", "evaluate", run, "--json", "--with", "clusters")[0].out)["bits_per_byte"]
        for ranks in (1, 2)
    )
    assert both["clusters"] == pytest.approx(alone["clusters"], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.clusters=null"], "set data.clusters.count, or take ensemble"),
        (["recipe.partition={name: random, branches: 2}"], "the branch random-0 is none"),
        (["data.clusters.domains=[cooking, sailing]", "recipe.branch_batch_size=2"], "the branch mending is none"),
    ],
)
def test_experts_of_no_cluster_are_refused(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    outcome = dist_moe(1, "train", "--run-dir", tmp_path / "run", config, *overrides)[0]
    assert outcome.code == 2
    assert message in outcome.err


def test_a_forest_without_clusters_is_not_merged_by_them(config: Path, run: Path) -> None:
    path = Forest(run).root / "clusters.npz"
    content = path.read_bytes()
    path.unlink()
    outcome = dist_moe(1, "forest", "evaluate", run, "--with", "clusters")[0]
    path.write_bytes(content)
    assert outcome.code == 2
    assert "which tells experts by words" in outcome.err
