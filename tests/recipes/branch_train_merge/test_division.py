"""The division of text and budget among branches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.recipes.branch_train_merge.budget import Budget
from dist_moe.recipes.branch_train_merge.partition import PartitionSettings, Provenance, RandomSplit, task_of_domain
from dist_moe.recipes.branch_train_merge.training import LaterFeed
from dist_moe.recipes.recipe import load_config, plan_new_run, validate_config
from dist_moe.recipes.stages import blocks_of
from dist_moe.tasks.language import LanguageModelTask
from tests.helpers.forests import HELD_OUT, TRAINED_ON, write_forest_config

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelTask:
    config = load_config(write_forest_config(tmp_path_factory.mktemp("divided")))
    opened: LanguageModelTask = config.data.open(progress=False)
    return opened


@pytest.mark.parametrize(
    "settings",
    [
        Provenance(domains=TRAINED_ON),
        RandomSplit(branches=3, domains=TRAINED_ON),
        RandomSplit(branches=1),
        Provenance(),
    ],
    ids=["provenance of two", "random of two", "one branch", "provenance"],
)
def test_branches_share_out_what_is_trained_on(task: LanguageModelTask, settings: PartitionSettings) -> None:
    """Every sequence of the domains is one branch's, and no other is anyone's."""
    partition = settings.divide(task)
    wanted = set(settings.domains or task.data.domains)
    assert set(partition.trained_on) == wanted
    union = partition.task_of(task, None)
    for part in PARTS:
        table = getattr(task.data, part)
        is_wanted = np.array([task.data.domains[d] in wanted for d in table.domain_N])
        assert ((partition.branch_of[part] >= 0) == is_wanted).all()
        starts = [getattr(partition.task_of(task, name).data, part).start_N for name in partition.branches]
        assert sorted(np.concatenate(starts)) == sorted(table.start_N[is_wanted])
        assert sorted(getattr(union.data, part).start_N) == sorted(table.start_N[is_wanted])
        if isinstance(settings, RandomSplit):
            assert max(map(len, starts)) - min(map(len, starts)) <= 1
        else:
            for name, start_N in zip(partition.branches, starts, strict=True):
                assert (start_N == getattr(task_of_domain(task, name).data, part).start_N).all()


def test_a_random_split_is_that_of_its_seed(task: LanguageModelTask) -> None:
    first, again, other = (RandomSplit(branches=2, seed=seed).divide(task).branch_of["train"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_a_domain_that_is_not_there_is_refused(task: LanguageModelTask) -> None:
    with pytest.raises(UserError, match=rf"partition.domains: there is no domain knitting; .*{HELD_OUT}"):
        Provenance(domains=("knitting",)).divide(task)


def budgets() -> Iterator[tuple[TrainConfig, int, float]]:
    """Yield lengths, numbers of branches, and shares of the seed."""
    for branches, steps, batch, share in product((1, 2, 5, 8), (1, 7, 40), (8, 40), (0.0, 0.25, 0.5, 0.9, 1.0)):
        yield TrainConfig(max_steps=steps, epochs=1000, batch_size=batch), branches, share


def test_a_forest_sees_as_many_tokens_as_its_twin() -> None:
    walked = 0
    for train, branches, share in budgets():
        if train.batch_size % branches and share < 1:
            with pytest.raises(UserError, match=rf"cannot be shared out over {branches} branches"):
                Budget.of(train, 1000, branches, min(share, 0.49), None)
            continue
        budget = Budget.of(train, 1000, branches, share, None)
        assert budget.sequences["forest"] == budget.sequences["twin"] == train.max_steps * train.batch_size
        assert budget.seed + budget.branch == budget.total
        assert (budget.branches == 0) == (budget.seed == budget.total)
        walked += 1
    assert walked > 60


def test_with_another_batch_it_does_to_half_a_step_of_each_branch() -> None:
    for train, branches, share in budgets():
        for batch in (1, 3, 16):
            budget = Budget.of(train, 1000, branches, share, batch)
            if budget.branches and budget.branch > 1:
                difference = abs(budget.sequences["forest"] - budget.sequences["twin"])
                assert difference <= branches * batch / 2


def test_a_branch_begins_its_text_anew(task: LanguageModelTask) -> None:
    feed = ShuffledFeed(task.train, 4, seed=0)
    later = LaterFeed(feed, 7)
    for step in range(5):
        ((ours,), (theirs,)) = (later.micro_batches(step + 7), feed.micro_batches(step))
        assert ours.token_BS.equal(theirs.token_BS)


def test_blocks_of_ranks_hold_an_expert_parallel_group() -> None:
    for world, stages, ep in product((1, 2, 4, 6, 8, 12), (1, 2, 3, 8), (1, 2, 4)):
        if world % ep:
            continue
        blocks, size = blocks_of(world, stages, ParallelConfig(expert_parallel_size=ep))
        assert blocks * size == world
        assert blocks <= stages
        assert size % ep == 0
        better = [b for b in range(blocks + 1, stages + 1) if world % b == 0 and world // b % ep == 0]
        assert better == []


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"recipe": {"branch_batch_size": 4096}}, r"branch_batch_size=4096 is larger than the \d+ training sequences"),
        (
            {"train": {"batch_size": 7}},
            r"train.batch_size=7 cannot be shared out over 2 branches; give a multiple of 2",
        ),
        ({"train": {"patience": 3}}, r"train.patience=3: .* equal budgets; set it to null"),
        ({"swap_search": {"examples": 8}}, r"swap_search: not with recipe.name=branch_train_merge; set it to null"),
        ({"model": {"permutation": {"epochs": 0.1}}}, r"recipe.merge: parameters cannot be averaged .*=null"),
        ({"recipe": {"merge": ["ensemble", "ensemble"]}}, r"recipe.merge=.*: each way of merging once"),
        ({"recipe": {"merge": [{"name": "ensemble", "top_k": 0}]}}, r"recipe.merge.*top_k=0"),
        ({"recipe": {"seed_share": 1.5}}, r"recipe.seed_share=1.5"),
        ({"recipe": {"partition": "topics"}}, r"partition.*'topics' is not a partition"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, sections: dict[str, dict[str, object]], sentence: str
) -> None:
    config = write_forest_config(tmp_path, **sections)
    with pytest.raises(UserError, match=sentence):
        plan_new_run(config, [], tmp_path / "run")


def test_images_make_no_forest() -> None:
    config = validate_config({"recipe": "branch_train_merge"})
    with pytest.raises(UserError, match=r"data.name=movielens-1m is no text; use data.name=text or brown"):
        config.check(1)
