"""Experts that are used together, in transformers: the same predictions as ours, of one model and of ensembles."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import UserError
from dist_moe.recipes.branch_train_merge import Forest
from dist_moe.recipes.branch_train_merge.average import averaged
from dist_moe.recipes.branch_train_merge.export import LOADER, write_exported
from dist_moe.recipes.branch_train_merge.merge import Ensemble, Exported
from dist_moe.recipes.branch_train_merge.scoring import new_model
from dist_moe.recipes.branch_train_merge.tend import merge_of, open_run, scorer_of
from dist_moe.recipes.recipe import load_config
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.forests import TRAINED_ON, write_forest_config
from tests.helpers.pool import on_ranks

transformers = pytest.importorskip("transformers")

BTX = "{name: btx, share: 0.2, gate: {name: top_k, k: 2, bias: false}}"
CACHED = "{name: ensemble, prior: cached}"
FIRST = TRAINED_ON[0]


def trained(directory: Path, model: dict[str, Any], merge: list[str]) -> Path:
    config = write_forest_config(directory, model=model)
    succeed(1, "train", "--run-dir", directory / "run", config, f"recipe.merge=[{', '.join(merge)}]")
    return directory / "run"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dense"), {"moe_every": 0, "layers": 2}, ["ensemble", BTX])


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of experts with MoE layers, whose gates transformers does not know."""
    return trained(tmp_path_factory.mktemp("sparse"), {"layers": 2}, ["ensemble"])


def predicted(run: str, merge: str, domain: str | None, prompts: list[list[int]]) -> Tensor:
    """What our module of a way of merging predicts."""
    plan = open_run(Path(run))
    with process_groups(plan.start.environment, ParallelConfig()) as groups, torch.no_grad():
        model = merge_of(merge).model(scorer_of(plan, groups, domain), domain, lambda: new_model(plan, groups))
        model.begin_evaluation()  # type: ignore[operator]
        predictions: Tensor = model.eval()(torch.tensor(prompts)).predictions[0]
        return predictions


def prompts(vocabulary: int = 250) -> Tensor:
    return torch.arange(32).view(2, 16) * 37 % vocabulary


def ours(run: Path, merge: str, domain: str | None = None) -> Tensor:
    (predictions,) = on_ranks(1, predicted, str(run), merge, domain, prompts().tolist())
    return torch.as_tensor(predictions)


def export(run: Path, directory: Path, merge: str, *options: object) -> str:
    return succeed(1, "forest", "export", run, directory, "--with", merge, *options)[0].out


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of experts that were still learning a permutation when their training ended."""
    model = {"layers": 2, "permutation": {"epochs": 100}}
    return trained(tmp_path_factory.mktemp("learning"), model, ["ensemble"])


@pytest.fixture
def load_ensemble(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads a directory by the code that it holds."""

    def load(directory: Path, **options: Any) -> Any:
        monkeypatch.syspath_prepend(directory)
        for name in ("ensemble", "posterior"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module("ensemble")
        assert Path(str(module.__file__)).parent == directory
        return module.load_ensemble(directory, **options)

    return load


@pytest.mark.parametrize(
    ("merge", "options", "architecture"),
    [
        ("average", (), "LlamaForCausalLM"),
        ("{name: average, weights: cached}", ("--domain", FIRST), "LlamaForCausalLM"),
        (BTX, (), "MixtralForCausalLM"),
    ],
)
def test_one_model_has_our_logits(
    dense: Path, tmp_path: Path, merge: str, options: tuple[str, ...], architecture: str
) -> None:
    assert export(dense, tmp_path / "hf", merge, *options).startswith(f"{architecture} of ")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(prompts()).logits
    torch.testing.assert_close(logits, ours(dense, merge, *options[1:]), rtol=1e-5, atol=1e-5)
    single = Forest(dense).path(FIRST)
    succeed(1, "export", single, "--hf", tmp_path / "single")  # another model, else the comparison would say nothing
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "single")
    with torch.no_grad():
        assert float((other(prompts()).logits - logits).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("merge", "options"),
    [
        ("ensemble", ()),
        ("{name: ensemble, history: previous}", ()),
        (CACHED, ("--domain", FIRST)),
        ("{name: ensemble, prior: cached, top_k: 1}", ("--domain", FIRST)),
    ],
)
def test_an_ensemble_has_our_log_probabilities(
    dense: Path, tmp_path: Path, merge: str, options: tuple[str, ...], load_ensemble: Callable[..., Any]
) -> None:
    place = tmp_path / "hf"
    said = export(dense, place, merge, *options)
    assert said.count("LlamaForCausalLM of ") == len(list((place / "experts").iterdir())) == 2 - ("top_k" in merge)
    ensemble = load_ensemble(place)
    with torch.no_grad():
        logp_BSV = ensemble(input_ids=prompts()).logits
    torch.testing.assert_close(logp_BSV.exp().sum(-1), torch.ones(2, 16, dtype=torch.float64))
    torch.testing.assert_close(logp_BSV, ours(dense, merge, *options[1:]), rtol=1e-5, atol=1e-5)


def test_experts_with_moe_layers_come_along_with_their_gates(
    sparse: Path, tmp_path: Path, load_ensemble: Callable[..., Any]
) -> None:
    export(sparse, tmp_path / "ensemble", "ensemble")
    with torch.no_grad():
        logp_BSV = load_ensemble(tmp_path / "ensemble", trust_remote_code=True)(prompts()).logits
    torch.testing.assert_close(logp_BSV, ours(sparse, "ensemble"), rtol=1e-5, atol=1e-5)
    assert export(sparse, tmp_path / "average", "average").startswith("DistMoEForCausalLM of ")
    average = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "average", trust_remote_code=True)
    with torch.no_grad():
        logits = average(prompts()).logits
    torch.testing.assert_close(logits, ours(sparse, "average"), rtol=1e-5, atol=1e-5)


def test_permutations_that_were_being_learnt_are_rounded(
    learning: Path, tmp_path: Path, load_ensemble: Callable[..., Any]
) -> None:
    export(learning, tmp_path / "hf", "ensemble")
    with torch.no_grad():
        logp_BSV = load_ensemble(tmp_path / "hf", trust_remote_code=True)(prompts()).logits
    torch.testing.assert_close(logp_BSV, ours(learning, "ensemble"), rtol=1e-5, atol=1e-5)
    outcome = dist_moe(1, "forest", "export", learning, tmp_path / "average", "--with", "average")[0]
    assert outcome.code == 2
    assert "every branch learns a permutation of its own" in outcome.err


def test_ranks_write_the_same_files(sparse: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        succeed(ranks, "forest", "export", sparse, tmp_path / str(ranks), "--with", "average")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12")
    assert one == two


def test_an_average_is_written_tensor_by_tensor(dense: Path, tmp_path: Path) -> None:
    """Of no expert more than a tensor is held at a time, and every one is read."""
    held: list[weakref.ref[Tensor]] = []
    read, most = set(), 0

    def watched(weights: ModelWeights) -> ModelWeights:
        def look(name: str, expert: int | None) -> Tensor:
            nonlocal most
            value = weights.read(name, expert)
            held.append(weakref.ref(value))
            read.add((weights.path, name))
            most = max(most, sum(one() is not None for one in held))
            return value

        return replace(weights, read=look)

    experts = [Forest(dense).weights(name) for name in TRAINED_ON]
    config = load_config(dense / "config.yaml")
    task = config.data.open(progress=False)
    exported = Exported({"average": averaged([watched(one) for one in experts], [1, 1])}, config)
    write_exported(exported, task, tmp_path / "hf", torch.float32)
    assert read == {(one.path, name) for one in experts for name in one}
    assert most <= len(experts)


def test_a_directory_of_an_ensemble(dense: Path, tmp_path: Path, load_ensemble: Callable[..., Any]) -> None:
    """Its experts are those of the forest, to the byte; it has the tokenizer; the loader generates."""
    place = tmp_path / "hf"
    export(dense, place, CACHED, "--domain", FIRST)
    about = json.loads((place / "ensemble.json").read_text())
    assert (about["experts"], about["history"], about["top_k"]) == (list(TRAINED_ON), "all", None)
    assert sum(about["prior"]) == pytest.approx(1)
    assert about["prior"][0] > 0.5, "the prior is that of the domain"
    for name in TRAINED_ON:
        succeed(1, "export", Forest(dense).path(name), "--hf", tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (place / "experts" / name).iterdir()} == files
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    ids_1S = tokenizer("stir the soup", return_tensors="pt").input_ids
    ensemble = load_ensemble(place)
    written_1S = ensemble.generate(ids_1S, max_new_tokens=20)  # longer than what the experts see
    assert written_1S[:, : ids_1S.shape[1]].equal(ids_1S)
    for end in range(ids_1S.shape[1], written_1S.shape[1]):
        logp_V = ensemble(written_1S[:, max(0, end - 16) : end]).logits[0, -1]
        assert int(written_1S[0, end]) == int(logp_V.argmax())
    draws = [
        ensemble.generate(ids_1S, 8, temperature=1.0, generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1)
    ]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_the_loader_needs_torch_and_transformers_alone(dense: Path, tmp_path: Path) -> None:
    export(dense, tmp_path / "hf", "ensemble")
    imported = set()
    for path in (tmp_path / "hf").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "posterior"}
    assert (tmp_path / "hf" / "ensemble.py").read_text() != LOADER.read_text()


class Odd(Ensemble):
    """Weighs its experts otherwise, which the loader does not know."""

    def log_weights(self, logp_JBS: Tensor, token_BS: Tensor, prior_J: Tensor) -> Tensor:
        """Return equal weights."""
        return torch.zeros_like(logp_JBS).log_softmax(0)


def test_what_cannot_be_written_is_refused(dense: Path, tmp_path: Path) -> None:
    def refused(merge: str, *options: object, directory: Path = tmp_path / "hf") -> str:
        outcome = dist_moe(1, "forest", "export", dense, directory, "--with", merge, *options)[0]
        assert outcome.code == 2
        assert not (tmp_path / "hf").exists()
        return outcome.err

    assert "clusters: cannot be written for other programs; these can: average, btx, ensemble" in refused("clusters")
    assert "name one by --domain" in refused(CACHED)
    assert "--domain knitting: there is no such domain" in refused(CACHED, "--domain", "knitting")
    assert "has trained no such mixture" in refused("{name: btx, gate: softmax}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    assert "is no empty directory; name another one" in refused("average", directory=tmp_path / "full")
    assert "is no empty directory" in refused("average", directory=tmp_path / "full" / "letter.txt")
    unused: Any = None
    with pytest.raises(UserError, match="these can: average, btx, ensemble"):
        Odd(name="ensemble").exported(unused, unused, None)
