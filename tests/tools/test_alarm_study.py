"""Alarms in real runs on tiny data: planted faults are told within 50 steps, healthy runs stay silent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.tables.tiny_named import write_tiny_census
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.commands import REPOSITORY, run_here
from tests.helpers.pool import RankPool
from tools import alarm_study
from tools.alarm_study import Case, Outcome, Verdict, faulty_cases, healthy_cases, judge, outcome

OTHERWISE = {
    "balance_loss_turned_words_top_k_2",  # becomes uneven, does not collapse
    "paper_s_temperatures_ratings_comet_1",  # a row moves
    "healthy_images_comet_118",  # collapses on a hundred pairs
}
"""Runs that are not on tiny data what they stand for."""

CASES = [
    case
    for case in (*healthy_cases(), *faulty_cases())
    if case.label != "nothing planted"  # a collapse that comes by itself comes on the study's own data alone
    and (case.is_sudden or case.seed < 4)
    and case.name not in OTHERWISE
]
FAST = "tokens_made_alike_ratings_top_k_0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> dict[str, list[str]]:
    """The overrides of each task that let it read tiny data."""
    root = tmp_path_factory.mktemp("data")
    ratings = write_tiny_movielens(root / "ratings", users=400, items=200)
    census, images = (
        write_tiny_census(root / "census", 3000, 100),
        write_tiny_images(root / "images", train=60, test=20),
    )
    places = f"root: {tiny_text['root']}, cache: {tiny_text['cache']}"
    return {
        "ratings": [f"data={{name: movielens-1m, root: {ratings}, cache: {root / 'cache'}}}"],
        "words": [f"data={{name: text, {places}, vocab_size: 300, sequence_length: 32, held_out: 0.2}}"],
        "census": [f"data={{name: census-income, root: {census}, cache: {root / 'cache'}}}"],
        "images": [f"data={{name: multi-mnist, root: {images}, cache: {root / 'cache'}, train_examples: 100}}"],
    }


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A rank of its own, which alone knows the module of faults."""
    ranks = RankPool(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=one.name, marks=[pytest.mark.slow] * (one.name != FAST)) for one in CASES]
)
def test_a_real_run(case: Case, pool: RankPool, data: dict[str, list[str]], tmp_path: Path) -> None:
    config, *overrides = case.words()
    words = ["train", str(REPOSITORY / config), *overrides, *data[case.task], "--run-dir", str(tmp_path / "run")]
    (ended,) = pool.run(run_here, (words,))
    assert ended.code == 0, ended.err
    verdict = judge(case, outcome(case, tmp_path / "run", ended.err))
    assert verdict.wrong == []
    assert (verdict.delay is None) == (case.expected is None)


def test_concentrations_by_hand() -> None:
    loads = [
        ([48, 48, 2, 2], 50),
        ([25, 25, 25, 25], 50),
        ([0, 0, 0, 0], 50),
        ([50, 50, 49, 50], 50),
        ([9, 1, 0, 0], 10),
    ]
    found = alarm_study.concentrations((np.array(load, dtype=float), tokens) for load, tokens in loads)
    np.testing.assert_allclose(found, [(0.96 - 0.5) / 0.5, 0, 0, 0, (0.9 - 0.25) / 0.75])
    share_S = np.array([0.1] * 5 + [0.95] * 14 + [0.5] + [0.95] * 20)
    assert alarm_study.completed_at(share_S) == 6, "the mean from there on is high enough, and so is the step itself"
    assert alarm_study.completed_at(share_S[:24]) is None


def says(kind: str, layer: int = 0) -> str:
    return f"ALARM after step 9: {kind}: MoE layer {layer} has 1.0 effective experts"


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (Outcome([(95, says("collapse"))], 75, 1.0), []),
        (Outcome([(90, says("loss of balance")), (120, says("collapse"))], 75, 1.0), []),
        (Outcome([(95, says("collapse within steps"))], 75, 1.0), []),
        (Outcome([], 75, 1.0), ["no alarm within 50 steps of step 70"]),
        (Outcome([(121, says("collapse"))], 75, 1.0), ["no alarm within 50 steps of step 70"]),
        (Outcome([(95, says("collapse"))], None, 0.5), ["the run does not have its fault"]),
        (Outcome([(60, says("loss of balance")), (95, says("collapse"))], 75, 1.0), [says("loss of balance")]),
        (Outcome([(80, says("dead layer")), (95, says("collapse"))], 75, 1.0), [says("dead layer")]),
        (Outcome([(80, says("collapse", 1)), (95, says("collapse"))], 75, 1.0), [says("collapse", 1)]),
    ],
)
def test_what_is_wrong_in_a_faulty_run(seen: Outcome, wrong: list[str]) -> None:
    assert judge(Case("planted", "ratings", "Top-k", 0, "collapse", 70), seen).wrong == wrong


def test_a_fault_that_grows_is_judged_from_where_it_is_complete() -> None:
    grows = Case("planted", "ratings", "Top-k", 0, "collapse", 70, is_sudden=False)
    assert judge(grows, Outcome([(125, says("collapse"))], 90, 1.0)) == Verdict(35, [])
    assert judge(grows, Outcome([(60, says("collapse"))], 90, 1.0)) == Verdict(-30, [says("collapse")])


def test_what_is_wrong_in_a_healthy_run_and_what_the_page_says_of_it() -> None:
    healthy, ill, uneven = (Case("healthy", "ratings", gate, 7) for gate in ("Top-k", "hash", "COMET"))
    seen = {healthy: Outcome([], None, 0.1), ill: Outcome([(9, says("collapse"))], 1, 0.5), uneven: Outcome([], 1, 0.8)}
    assert [judge(case, one).wrong for case, one in seen.items()] == [
        [],
        [says("collapse")],
        ["its concentration is 0.80"],
    ]
    fault = Case("planted", "words", "Top-k", 0, "dead layer", 70)
    page = alarm_study.page(seen | {fault: Outcome([(90, says("dead layer", 1))], None, 0.0)})
    assert "| dead layer | planted | words, Top-k | 1 | 1 | 20, 20, 20 |" in page
    assert "3 healthy runs, no alarm in 2." in page
    assert f"- healthy_ratings_hash_7: {says('collapse')}" in page


def test_a_search_that_moves_nothing_is_told_of_from_its_end() -> None:
    case = next(one for one in CASES if one.expected == alarm_study.SEARCH)
    told = [(70, "ALARM after step 70: search without effect: the permutation search has moved no row of moe")]
    assert judge(case, Outcome(told, None, 0.0, still_since=62)).delay == 8
    assert judge(case, Outcome([], None, 0.0, still_since=62)).wrong == ["no alarm within 50 steps of step 62"]
    assert judge(case, Outcome([], None, 0.0)).wrong == ["the run does not have its fault"]
