"""Every field of every section that a configuration can have, and values that nobody would give it.

The fields come from the settings' own classes, as the bases below hold them, so that a new field is among them.
"""

from __future__ import annotations

import copy
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dist_moe.config.plain_yaml import yaml_text
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.recipes.recipe import RunStart, plan_new_run, train, validate_config
from tests.data.graphs.tiny_graphs import write_csv, write_tiny_cora
from tests.data.labelled_text.tiny_texts import SAMPLES, write_messages
from tests.data.tables.tiny_named import write_tiny_census, write_tiny_kuairand, write_tiny_movielens_table
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.runs import TINY_RUN
from tests.helpers.tables import MODELS as TABLE_MODELS
from tests.helpers.tables import TABLE_SCHEMA, write_table
from tests.helpers.text_runs import write_encoder
from tests.helpers.texts import TINY_LM, write_tiny_text

VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 10**300),
    *(0.0, -0.0, 1.0, 0.5, 1.5, -1.5, 1e-308, 5e-324, 1e-38, 1e-30, 1e23, 1e38, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf"), None, True, False),
    *("", ".", "x", "1", "auto", "true", "\n", "é漢", "x" * 100_000, "/dev/null", "/proc"),
    *([], {}, [1], [0, 0], [1, 1], [-1, 2], [2**53, 1], [2**63, 2**63], [1e308, 1e308], [1e-308, 1e-308], [1] * 99),
    *([None], [[1]], ["x"], [""], [{}], [{"name": "x"}]),
    *({"name": "x"}, {"name": None}, {"name": [1]}, {"name": {"name": "x"}}, {"x": 1}, {"": {}}, {"a": {"b": [None]}}),
)


@dataclass(frozen=True)
class Case:
    """One value in one field of a base, by dotted name; numbers stand for entries of a list."""

    base: str
    name: str
    value: Any

    def content(self, bases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The base with the value in its place."""
        changed: dict[str, Any] = _with(bases[self.base], self.name.split("."), self.value)
        return changed

    def __str__(self) -> str:
        return f"{self.base}: {self.name}={self.value!r}"[:150]


def _with(section: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of ``section``, as deep as ``path``, with ``value`` at its end."""
    if not path:
        return copy.deepcopy(value)
    changed, key = copy.copy(section), int(path[0]) if isinstance(section, list) else path[0]
    changed[key] = _with(section[key], path[1:], value)
    return changed


def write_bases(root: Path) -> dict[str, dict[str, Any]]:
    """Configurations that train two steps on tiny data; among them they have every section that there is."""
    cache = str(root / "cache")
    ratings = {"name": "movielens-1m", "root": str(write_tiny_movielens(root / "ratings")), "cache": cache}
    images = {"name": "multi-mnist", "root": str(write_tiny_images(root / "images", train=42, test=9)), "cache": cache}
    text = TINY_LM["data"] | {"root": str(write_tiny_text(root / "text")), "cache": cache}
    encoder = {"encoder": str(write_encoder(root / "encoder")), "cache": cache, "max_length": 48}
    messages = encoder | {"name": "sms-spam", "root": str(write_messages(root / "messages"))}
    questions = encoder | {"name": "squad-v2", "root": str(SAMPLES / "SQuAD"), "stride": 4}

    table = TABLE_SCHEMA | {"name": "table", "files": str(write_table(root / "table.csv", rows=200)), "cache": cache}
    census = {"name": "census-income", "root": str(write_tiny_census(root / "census")), "cache": cache}
    videos = {"name": "kuairand", "root": str(write_tiny_kuairand(root / "videos")), "cache": cache}
    movies = {"name": "movielens-1m-table", "root": str(write_tiny_movielens_table(root / "movies")), "cache": cache}

    graph = {"name": "graph", "root": str(write_csv(root / "graph")), "cache": cache}
    cora = {"name": "cora", "root": str(write_tiny_cora(root / "cora")), "split": "random", "cache": cache}

    def run(data: dict[str, Any], model: dict[str, Any], **sections: Any) -> dict[str, Any]:
        length = {"epochs": 2.0, "max_steps": 2, "batch_size": 8, "checkpoint_every": 1}
        content = {"data": data, "model": model, "train": length, "deepspeed": TINY_RUN["deepspeed"]} | sections
        whole: dict[str, Any] = validate_config(content).plain()
        return whole

    def recommender(gate: dict[str, Any], **sections: Any) -> dict[str, Any]:
        return run(ratings, TINY_RUN["model"] | {"gate": gate} | sections.pop("model", {}), **sections)

    few = {"examples": 64, "verified_on": 32, "every_steps": 1}
    searches = {"swap_search": {"examples": 64, "every_epochs": 0.01}, "assignment_search": few}
    bert = {"name": "bert_classifier", "num_experts": 2, "expert_hidden": 8, "gate": {"name": "top_k", "k": 1}}
    bases = {
        "comet": recommender({"name": "comet", "k": 2}, model={"permutation": {"epochs": 0.01}}),
        "top_k": recommender({"name": "top_k"}, placement={}, **searches),
        "dselect_k": recommender({"name": "dselect_k"}),
        "hash": recommender({"name": "hash"}),
        "ada_moe": recommender({"name": "ada_moe"}),
        "relu": recommender({"name": "relu"}),
        "smoe_dropout": recommender({"name": "smoe_dropout"}),
        "softmax": recommender({"name": "softmax"}, model={"low_rank": {"rank": 2, "rows": [{"weight": 3}]}}),
        "images": run(images, {"experts": {"channels": [2, 3], "units": [6, 5]}, "head_units": [7]}),
        "text": run(text, TINY_LM["model"]),
        "dense text": run(text, TINY_LM["model"] | {"moe_every": 0}),
        "table": run(table, TABLE_MODELS["mmoe"] | {"name": "mmoe"}),
        "census": run(census, TABLE_MODELS["ple"] | {"name": "ple"}),
        "videos": run(videos, {"name": "home", "experts": {"units": [8]}}),
        "movies": run(movies, TABLE_MODELS["shared_bottom"] | {"name": "shared_bottom"}),
        "nodes": run(cora, {"name": "node_classifier"}),
        "own nodes": run(graph, {"name": "node_classifier", "network": {"name": "gat"}}),
        "more nodes": run(graph, {"name": "node_classifier", "network": {"name": "gin"}}),
        "dense bert": run(messages, {"name": "bert_classifier", "moe_every": 0}),
        "wandb": run(cora, {"name": "node_classifier"}, trackers=["wandb"]),
        "mlflow": run(cora, {"name": "node_classifier"}, trackers=["mlflow"]),
        "answers": run(questions, {"name": "bert_answerer", "moe_every": 0}, train={"max_steps": 1, "batch_size": 2}),
    }
    forest = {"name": "branch_train_merge", "partition": {"name": "random", "branches": 2}}
    bases["forest"] = run(text, TINY_LM["model"] | {"moe_every": 0}, recipe=forest)
    forest = {"name": "branch_train_merge", "partition": {"domains": ["cooking"]}, "merge": ["average", "ensemble"]}
    bases["small forest"] = run(text, TINY_LM["model"] | {"moe_every": 0}, recipe=forest)
    for merge in ("clusters", "btx"):
        forest, clusters = {"name": "branch_train_merge", "merge": [{"name": merge}]}, {"clusters": {"count": 2}}
        bases[merge] = run(text | clusters, TINY_LM["model"] | {"moe_every": 0}, recipe=forest)
    runs = {name: train_case(root / "runs" / name, bases[name]) for name in ("text", "dense text", "dense bert")}
    start = {"name": "decoder", "run": str(runs["dense text"])}
    bases["up-cycled text"] = run(text, TINY_LM["model"] | {"experts": {"hidden": 20}}, start=start)
    start = {"name": "bert", "run": str(runs["dense bert"]), "importance_examples": 4}
    model = {"name": "weak_strong", "weak": {"name": "gat", "hidden": 8}, "strong": {"name": "gat", "hidden": 8}}
    bases["gated nodes"] = run(graph, model | {"confidence": {"name": "features"}})
    bases["nodes with maps of their own"] = run(graph, model | {"confidence": {"name": "hyper_network"}})
    length = {"max_steps": 1, "batch_size": 8, "patience": 1}
    recipe = {"name": "mowst", "max_sessions": 1, "compare": False}
    bases["mowst"] = run(graph, {"name": "weak_strong"}, recipe=recipe, train=length)
    bases["random mowst"] = run(graph, {"name": "weak_strong", "confidence": {"name": "random"}})
    for name, more in (("moebert", {}), ("dhkd", {"auxiliary_head": "linear"})):
        recipe = {"name": name, "teacher": str(runs["dense bert"])}
        bases[name] = run(messages, bert | more, recipe=recipe, start=start)
    recipe = {"name": "merge_compress", "source": str(runs["text"]), "merge": {"experts": 2, "examples": 4}}
    recipe |= {"compress": {"rank": 2, "warm_up": 0, "hold": 1}, "recover_again": True}
    bases["merge_compress"] = run(text, TINY_LM["model"], recipe=recipe)
    return bases


def train_case(run_dir: Path, content: dict[str, Any]) -> Path:
    """Train in a new directory as the command does, by way of a file. Raises UserError where it is refused."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml_text(content), encoding="utf-8")
    assert train(plan_new_run(path, [], run_dir)) == 0
    return run_dir


def plan_case(run_dir: Path, content: dict[str, Any]) -> None:
    """Do all that is done before any process group exists. Raises UserError where it is refused."""
    environment = LaunchEnvironment.read()
    config = validate_config(content).fitted(environment.world_size)
    config.check(environment.world_size)
    config.recipe.plan(RunStart(config, RunDirectory(run_dir), environment))


def sections_of(content: dict[str, Any]) -> Iterator[tuple[str, BaseModel]]:
    """Yield the sections of a configuration with their dotted names, the whole first, but for DeepSpeed's own."""
    waiting: list[tuple[str, Any]] = [("", validate_config(content))]
    while waiting:
        name, section = waiting.pop(0)
        if isinstance(section, BaseModel):
            yield name, section
            waiting += [(f"{name}.{field}".lstrip("."), value) for field, value in section]
        elif isinstance(section, tuple | dict):
            parts = section.items() if isinstance(section, dict) else enumerate(section)
            waiting += [(f"{name}.{key}", value) for key, value in parts]


def cases_of(bases: dict[str, dict[str, Any]], values: Sequence[Any] = VALUES) -> list[Case]:
    """Every value in every field of every class of sections, each class in the first base that has it."""
    seen: set[tuple[type, str]] = set()
    cases = []
    for base, content in bases.items():
        for name, section in sections_of(content):
            for field in type(section).model_fields:
                if (type(section), field) not in seen and field != "deepspeed":
                    seen.add((type(section), field))
                    cases += [Case(base, f"{name}.{field}".lstrip("."), value) for value in values]
    return cases


class Late(BaseException):
    """A case took longer than it may; no handler of the product's may take it for an error of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Late in the main thread when the time is over."""

    def stop(*_: Any) -> None:
        raise Late(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
