"""Every (task, model, gate, experts) of the registries is refused by a sentence before it is built, or takes a step."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.data import DATA as DATA_SETS
from dist_moe.engine.callbacks import CALLBACKS
from dist_moe.engine.monitor.trackers import TRACKERS
from dist_moe.errors import UserError
from dist_moe.experts import EXPERTS
from dist_moe.gates import GATES
from dist_moe.models import models_of_kind
from dist_moe.models.moe_model import MODELS
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import follow
from dist_moe.recipes.recipe import RECIPES, validate_config
from dist_moe.recipes.supervised.size import check_model
from dist_moe.tasks import TASKS, Task, WeightedObjective, build_model
from tests.data.graphs.tiny_graphs import write_csv, write_tiny_cora
from tests.data.labelled_text.tiny_texts import SAMPLES, write_messages
from tests.data.tables.tiny_named import write_tiny_census, write_tiny_kuairand, write_tiny_movielens_table
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.tables import TABLE_SCHEMA, write_table
from tests.helpers.text_runs import write_encoder
from tests.helpers.texts import TINY_LM, write_tiny_text

REGISTRIES: tuple[Any, ...] = (CALLBACKS, DATA_SETS, EXPERTS, GATES, MODELS, RECIPES, TASKS, TRACKERS)
SIZES: dict[str, dict[str, Any]] = {
    "recommender": {"embedding_dim": 6, "tower_units": 8},
    "two_image_classifier": {"head_units": [6]},
    "transformer": {key: TINY_LM["model"][key] for key in ("dim", "heads", "kv_heads", "dense_hidden")} | {"layers": 2},
    "bert_classifier": {"hidden": None},
    "bert_answerer": {"hidden": None},
    "shared_bottom": {"bottom_units": [6]},
}
EXPERTS_OF = {"dense_relu": {"units": 6}, "conv": {"channels": [2, 3], "units": [6, 5]}, "feed_forward": {"hidden": 6}}
EXPERTS_OF["mlp"] = {"units": [6]}
MORE: list[dict[str, Any]] = [{"permutation": {"epochs": 1.0}}, {"num_slots": 8}, {"moe_every": 0}]


def write_stars(root: Path) -> Path:
    root.mkdir()
    rows = np.random.default_rng(0).integers(0, 9, (60, 3))
    (root / "stars.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return root / "stars.csv"


DATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "RecommendationSettings": lambda root: {"name": "movielens-1m", "root": write_tiny_movielens(root, 20, 15)},
    "TwoImagesSettings": lambda root: {"name": "multi-mnist", "root": write_tiny_images(root, train=24, test=5)},
    "LanguageModelSettings": lambda root: TINY_LM["data"] | {"root": write_tiny_text(root)},
    "TextClassificationSettings": lambda root: {"name": "sms-spam", "root": write_messages(root), "max_length": 48},
    "QuestionAnsweringSettings": lambda root: {
        "name": "squad-v2",
        "root": SAMPLES / "SQuAD",
        "max_length": 64,
        "stride": 8,
    },
    "TableTaskSettings": lambda root: TABLE_SCHEMA | {"name": "table", "files": str(write_table(root / "t.csv", 200))},
    "CensusIncomeSettings": lambda root: {"name": "census-income", "root": write_tiny_census(root)},
    "KuaiRandSettings": lambda root: {"name": "kuairand", "root": write_tiny_kuairand(root)},
    "MovieLensTableSettings": lambda root: {"name": "movielens-1m-table", "root": write_tiny_movielens_table(root)},
    "NamedGraphSettings": lambda root: {"name": "cora", "root": write_tiny_cora(root), "split": "random"},
    "OwnGraphTaskSettings": lambda root: {"name": "graph", "root": write_csv(root)},
    "StarsSettings": lambda root: {"name": "stars", "root": write_stars(root)},
    "WavesSettings": lambda root: {"name": "waves"},
}


@pytest.fixture(scope="module", autouse=True)
def _outside_modules() -> Iterator[None]:
    """What modules of the user's register is walked over as well, and is known to no other test."""
    modules = {"tests.recipes.outside.stars", "tests.recipes.outside.waves"}
    new, before = modules - sys.modules.keys(), [registry.by_name for registry in REGISTRIES]
    for name in modules:
        importlib.import_module(name)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
    for name in new:
        del sys.modules[name]


def test_all_kinds_of_data_are_walked_over() -> None:
    assert {settings.__name__ for settings in TASKS.classes} == set(DATA)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def sections(kind: str) -> Iterator[dict[str, Any]]:
    """Every model of a kind with every gate; each with every type of experts, and with what else changes its layers."""
    for model, gate in itertools.product(models_of_kind(kind), GATES.names):
        section = SIZES.get(model, {}) | {"name": model, "num_experts": 4, "gate": {"name": gate}}
        yield from (section | {"experts": {"name": name} | EXPERTS_OF.get(name, {})} for name in EXPERTS.names)
        yield from (section | more for more in MORE)


def take_step(config: Any, task: Task) -> None:
    """Of the model that is built for good, whose predictions can be followed, by itself without loss."""
    model, rows = build_model(config, task, SingleWorld()), np.arange(2)
    batch = task.train.batch(rows, rows)
    objective = WeightedObjective(task, config.target_weights, shares=1)
    output = model.train()(*batch.inputs)
    loss = objective.of_output(output, batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    if type(task).__module__.startswith("dist_moe."):
        assert len(task.prediction_kinds) % len(config.data.target_names) == 0
        for kind, predicted in zip(task.prediction_kinds, output.predictions, strict=True):
            assert follow(kind, predicted.detach(), predicted.detach(), 2.0, len(rows)) == pytest.approx(0, abs=1e-6)


def told(function: Callable[[], Any]) -> tuple[Any, str]:
    """What it gives, or the sentence by which it refuses."""
    try:
        return function(), ""
    except UserError as error:
        return None, str(error)


def checked(content: dict[str, Any]) -> Any:
    config = validate_config(content)
    config.check(world_size=1)
    return config


@pytest.mark.parametrize("data", DATA)
def test_it_is_refused_or_takes_a_step(data: str, tmp_path: Path, encoder: Path) -> None:
    content = DATA[data](tmp_path / "raw")
    settings = TASKS.by_name[content["name"]]
    content |= dict.fromkeys({"cache"} & settings.model_fields.keys(), tmp_path / "cache")
    content |= dict.fromkeys({"encoder"} & settings.model_fields.keys(), encoder)
    content = {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}
    task: Task | None = None
    seen: Counter[str] = Counter()
    for section in sections(settings.kind):
        start = {"start": {"conversion": {"order": "random"}}} if "bert" in section["name"] else {}
        whole = {"data": content, "model": section, "train": {"batch_size": 4}} | start
        config, refusal = told(partial(checked, whole))
        if config is None:
            assert refusal.startswith(("model", "the configuration is not valid:\n  model"))
            continue
        task = task or config.data.open(progress=False)
        _, refusal = told(partial(check_model, config, task))
        if not refusal:
            take_step(config, task)
        seen[refusal.partition("=")[0] + (" of hash" if "model.gate.name=hash" in refusal else "")] += 1
    assert seen[""] >= len(GATES.names), seen
    assert seen.keys() <= {"", "model.experts.name", "model.name of hash"}, seen
    assert (task is not None and task.id_counts() is None) == ("model.name of hash" in seen), seen
