"""Every value in every field of the configuration is refused with a sentence, or trains."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config.listing import KEY, fields_of
from dist_moe.config.registry import names_of
from dist_moe.engine.monitor.trackers import TRACKERS
from dist_moe.errors import UserError
from dist_moe.experts.registry import EXPERTS
from dist_moe.gates import GATES
from dist_moe.models import MODELS
from dist_moe.recipes import RECIPES
from dist_moe.recipes.recipe import validate_config
from dist_moe.recipes.supervised.start import STARTS
from dist_moe.tasks import TASKS
from tests.helpers.every_field import Case, cases_of, plan_case, sections_of, train_case, within, write_bases

Bases = dict[str, dict[str, Any]]
Content = dict[str, Any]

SECONDS = 20
"""For milliseconds of work: what is refused must be so at once, but a machine that is busy is no fault."""

PLANNED, TRAINED = 60, 6
LONGEST_MESSAGE = 2000


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where caches of odd names may be made."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return write_bases(tmp_path_factory.mktemp("bases"))


def refusal_of(action: Callable[[Content], Any], content: Content, seconds: float) -> str | None:
    """The sentence with which an action refuses a configuration, None if it does not."""
    try:
        with within(seconds):
            action(content)
    except UserError as refusal:
        return str(refusal)
    return None


def passing(action: Callable[[Content], Any], bases: Bases, cases: Sequence[Case], seconds: float) -> list[Case]:
    """The cases that an action takes. The others must be refused with a sentence, in time."""
    passed = []
    for case in cases:
        try:
            message = refusal_of(action, case.content(bases), seconds)
        except BaseException as error:
            raise AssertionError(str(case)) from error
        assert message is None or 0 < len(message) < LONGEST_MESSAGE, str(case)
        passed += [case] if message is None else []
    return passed


def check(content: Content) -> None:
    validate_config(content).check(1)


def valid_cases(bases: Bases) -> list[Case]:
    """All cases that are valid by themselves, but for those that would fetch data, or need packages of trackers."""
    valid = [case for case in passing(check, bases, cases_of(bases), SECONDS) if case.base not in {"wandb", "mlflow"}]
    return [case for case in valid if not (case.name in ("data.root", "data.encoder") and case.value is None)]


def test_the_bases_have_every_section(bases: Bases) -> None:
    """So that the fields of a new one are walked, it needs a base."""
    sections = [pair for content in bases.values() for pair in sections_of(content)]
    walked_kinds = {type(section) for _, section in sections}
    outside: set[str] = set()
    for registry in (GATES, EXPERTS, MODELS, RECIPES, STARTS, TASKS, TRACKERS):
        others = [kind for kind in registry.classes if not kind.__module__.startswith("dist_moe.")]
        outside |= {name for kind in others for name in names_of(kind)}
        assert set(registry.classes) - set(others) - walked_kinds == set()
    walked = {f"{name}.{field}".lstrip(".") for name, section in sections for field in type(section).model_fields}
    ours = [recipe for recipe in RECIPES.classes if outside.isdisjoint(names_of(recipe))]
    fields = [field for recipe in ours for field in fields_of(recipe.configuration) if field.owner not in outside]
    elsewhere = ("callbacks[]", "recipe.merge[].gate.")  # the gates of mixtures are those of models
    known = {field.name.replace("[]", ".0") for field in fields if not field.name.startswith(elsewhere)}
    assert {name for name in known if not fnmatch.filter(walked, name.replace(KEY, "*"))} == set()


def test_values_are_refused_or_train(bases: Bases, tmp_path: Path) -> None:
    """All values are checked; a sample of those that pass is planned, a smaller one trained."""
    valid = valid_cases(bases)
    assert len(valid) > 500
    chosen = random.Random(0)
    planned = passing(partial(plan_case, tmp_path / "run"), bases, chosen.sample(valid, PLANNED), SECONDS)
    trained = chosen.sample(planned, TRAINED)
    assert passing(partial(train_case, tmp_path / "run"), bases, trained, 10 * SECONDS) == trained


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_all_values_are_refused_or_train(bases: Bases, tmp_path: Path) -> None:
    planned = passing(partial(plan_case, tmp_path / "run"), bases, valid_cases(bases), SECONDS)
    assert passing(partial(train_case, tmp_path / "run"), bases, planned, 10 * SECONDS) == planned


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("parallel.timeout_s", 1e23, ["parallel.timeout_s=1e+23", "integer"]),
        ("parallel.timeout_s", 10**23, ["less than or equal to 31536000"]),
        ("parallel.timeout_s", 1, ["parallel.stall_s=0.5", "at least 1"]),
        ("parallel.stall_s", 1e-30, ["parallel.stall_s=1e-30", "at least 1"]),
        ("swap_search.every_epochs", 1e308, ["swap_search.every_epochs=1e+308", "less than or equal to 1000000"]),
        ("model.experts.units", 10**23, ["model.experts.units=", "less than or equal to 1048576"]),
        ("model.num_experts", 2**63 - 1, ["model.num_experts=", "less than or equal to 65536"]),
        ("model.num_experts", 2**16, ["model.num_experts=65536", "GiB"]),
        ("train.max_steps", True, ["train.max_steps=True", "integer"]),
        ("train.max_steps", "1", ["train.max_steps='1'", "integer"]),
        ("train.max_steps", 2.0, ["train.max_steps=2.0", "integer"]),
        ("train.async_checkpoints", 1, ["train.async_checkpoints=1", "boolean"]),
        ("train.epochs", True, ["train.epochs=True", "number"]),
        ("data.cache", "x" * 300, ["data.cache=", "255 bytes"]),
    ],
)
def test_what_used_to_pass_or_hang(bases: Bases, tmp_path: Path, name: str, value: Any, words: list[str]) -> None:
    content = Case("top_k", name, value).content(bases)
    if value == 2**16:
        content["model"] = content["model"] | {"embedding_dim": 2**16}
    message = refusal_of(partial(plan_case, tmp_path / "run"), content, SECONDS)
    assert message is not None
    assert all(word in message for word in words), message


def test_more_steps_than_a_run_can_have(bases: Bases, tmp_path: Path) -> None:
    content = Case("softmax", "train.epochs", 1e6).content(bases)
    content["train"] = content["train"] | {"max_steps": None}
    message = refusal_of(partial(plan_case, tmp_path / "run"), content, SECONDS)
    assert message is not None
    assert message.startswith("train.epochs=1e+06 are ")
    assert "a run has at most 99,999,999" in message
