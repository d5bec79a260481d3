"""Branch-Train-MiX: the mixture's values, what it learns, the same at any layout, and as a run like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint import ROUTERS, newest_checkpoint, place_weights, read_model
from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.experts import FeedForwardConfig
from dist_moe.gates import GATES
from dist_moe.models import RunShape, Transformer, TransformerConfig
from dist_moe.models.transformer import rotary_table
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.branch_train_merge import BTX, Forest
from dist_moe.recipes.branch_train_merge.btx import mixture_of
from dist_moe.recipes.branch_train_merge.tend import merge_of
from dist_moe.recipes.recipe import load_config
from dist_moe.tasks import build_model
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.forests import write_forest_config
from tests.helpers.runs import losses_of, records_of

SIZES = {"layers": 4, "dim": 16, "heads": 2, "kv_heads": 1, "dense_hidden": 20}
VOCABULARY = 30
DENSE = TransformerConfig(moe_every=0, **SIZES)  # type: ignore[arg-type]
WEIGHTS_SUM_TO_ONE: dict[str, dict[str, Any]] = {
    "top_k": {"k": 2},
    "comet": {"k": 2},
    "softmax": {},
    "dselect_k": {"k": 2},
    "smoe_dropout": {"schedule_steps": 10},
}
BTX_TOP_K = {"name": "btx", "gate": {"name": "top_k", "k": 2, "bias": False}, "share": 0.5}
SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-3, "total_num_steps": 6}}


def dense(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = DENSE.build(VOCABULARY, RunShape(SingleWorld(), 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.1 * torch.randn_like(parameter))  # 0.02 is so small that it would be linear
    return model


def mixed(models: list[Transformer], gate: dict[str, Any], moe_every: int = 2) -> Transformer:
    settings = GATES.by_name[gate["name"]].model_validate(gate)
    config = DENSE.model_copy(
        update={
            "num_experts": len(models),
            "moe_every": moe_every,
            "gate": settings,
            "experts": FeedForwardConfig(hidden=SIZES["dense_hidden"]),
        }
    )
    torch.manual_seed(9)
    model = config.build(VOCABULARY, RunShape(SingleWorld(), 1)).double()
    place_weights(model, mixture_of([weights_of(one) for one in models], config), ROUTERS)
    return model.eval()


@pytest.mark.parametrize("gate", WEIGHTS_SUM_TO_ONE)
def test_the_mixture_of_copies_is_what_was_copied(gate: str) -> None:
    """Whatever the gate says, as long as its weights sum to 1."""
    model, token_BS = dense(0), torch.arange(24).view(2, 12) % VOCABULARY
    mixture = mixed([model] * 4, {"name": gate} | WEIGHTS_SUM_TO_ONE[gate], moe_every=1)
    torch.testing.assert_close(mixture(token_BS).predictions[0], model(token_BS).predictions[0], rtol=1e-9, atol=1e-9)


def test_values_and_gradients_are_those_of_a_loop_over_tokens_and_experts() -> None:
    """Attention and every other layer averaged; expert j is the feed-forward network of model j."""
    models, token_BS = [dense(seed) for seed in range(3)], torch.arange(20).view(2, 10) % VOCABULARY
    mixture = mixed(models, {"name": "top_k", "k": 2})
    mean = dense(0)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([dict(one.named_parameters())[name] for one in models]).mean(dim=0))
    output = mixture(token_BS)
    routes = iter(layer.routes[0] for layer in output.layers)

    def looped(layer: nn.Module, number: int, x_TD: Tensor) -> Tensor:
        if not mixture.config.has_experts(number):
            result: Tensor = layer.dense(x_TD)  # type: ignore[operator]
            return result
        route, sums = next(routes), [torch.zeros_like(x_TD[0]) for _ in x_TD]
        triples = zip(route.token_N.tolist(), route.slot_N.tolist(), route.weight_N, strict=True)
        for token, expert, weight in triples:
            sums[token] = sums[token] + weight * models[expert].layers[number].dense(x_TD[token])
        return torch.stack(sums)

    def naive() -> Tensor:
        x_BSD = mean.embedding(token_BS)
        table = rotary_table(token_BS.shape[1], DENSE.head_width, DENSE.rope_theta, x_BSD)
        for number, layer in enumerate(mean.layers):
            x_BSD = x_BSD + layer.attention(layer.attention_norm(x_BSD), table)
            normed_TD = layer.feed_forward_norm(x_BSD).flatten(0, 1)
            x_BSD = x_BSD + looped(layer, number, normed_TD).view_as(x_BSD)
        result: Tensor = mean.head(mean.norm(x_BSD))
        return result

    expected = naive()
    torch.testing.assert_close(output.predictions[0], expected, rtol=1e-10, atol=1e-10)
    # The last layer's experts: those below also change what later gates say, which here belongs to the mixture.
    expected.square().sum().backward(retain_graph=True)
    theirs = models[1].layers[3].dense.up.weight.grad
    mixture.zero_grad()
    output.predictions[0].square().sum().backward()
    ours = mixture.layers[3].moe.experts.up.grad
    assert theirs is not None
    assert float(theirs.abs().max()) > 0
    torch.testing.assert_close(ours[1].T, theirs, rtol=1e-8, atol=1e-8)


def test_one_tensor_of_each_model_is_read_at_a_time() -> None:
    """And every tensor of every model is."""
    models, read = [weights_of(dense(seed)) for seed in range(3)], []
    held = [
        type(one)(
            one.kinds, one.specs, lambda name, expert, one=one, j=j: read.append((j, name)) or one.read(name, None)
        )
        for j, one in enumerate(models)
    ]
    config = DENSE.model_copy(
        update={"num_experts": 3, "moe_every": 1, "experts": FeedForwardConfig(hidden=SIZES["dense_hidden"])}
    )
    weights = mixture_of(held, config)
    assert read == []
    for name in weights:
        before = len(read)
        pieces = list(weights.pieces(name))
        assert len({one for _, one in read[before:]}) == 1
        assert len(pieces) == (3 if "experts" in name else 1)
    assert set(read) == {(j, name) for j in range(3) for name in models[0]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four branches of dense decoders, and mixtures of them: of a gate that transformers knows, and of COMET's."""
    comet = {"name": "btx", "gate": {"name": "comet", "k": 2}, "learns": "gates", "share": 0.5, "scheduler": SCHEDULE}
    recipe = {"partition": {"name": "random", "branches": 4}, "merge": [BTX_TOP_K, comet]}
    model = {"moe_every": 0, "layers": 2}
    train = {"checkpoint_every": 2}
    return write_forest_config(tmp_path_factory.mktemp("btx"), recipe=recipe, model=model, train=train)


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    succeed(1, "train", "--run-dir", config.parent / "run", config)
    return config.parent / "run"


def directory_of(run: Path, number: int) -> Path:
    merge = load_config(run / "config.yaml").recipe.merge[number]
    assert isinstance(merge, BTX)
    return Forest(run).root / merge.directory


def test_the_mixture_is_a_run_that_is_evaluated_like_any_other(run: Path) -> None:
    """With the figures that the forest's table has of it; its gates and experts have learnt."""
    report = json.loads((Forest(run).root / "evaluation.json").read_text())["bits_per_byte"]
    merges = load_config(run / "config.yaml").recipe.merge
    assert [merge.label for merge in merges] == [
        "btx top_k, bias False, share 0.5",
        "btx comet, share 0.5, learns gates",
    ]
    for number, label in enumerate(merge.label for merge in merges):
        directory = directory_of(run, number)
        (said,) = succeed(1, "evaluate", directory, "--json")
        test = json.loads(said.out)["test"]
        for domain in ("cooking", "mending", "sailing"):
            assert report[label][domain] == pytest.approx(test[f"bits_per_byte_{domain}"], rel=1e-5)
        made = load_config(directory / "config.yaml")
        assert (made.model.num_experts, made.model.moe_every, made.recipe.name) == (4, 1, "supervised")


def test_gates_alone_learn_or_all_parameters(run: Path) -> None:
    forest = Forest(run)
    experts = [forest.weights(name) for name in forest.experts]
    for number, everything in ((0, True), (1, False)):
        directory = directory_of(run, number)
        trained = read_model(newest_checkpoint(directory))
        config = load_config(directory / "config.yaml").model
        begun = mixture_of(experts, config)
        changed = {name for name in begun if not trained[name].equal(begun[name])}
        assert changed == (set(begun) if everything else set())
        # Its gates began with what their seed draws, and have moved.
        fresh = build_model(load_config(directory / "config.yaml"), task_of(run), SingleWorld())
        gates = [name for name, _ in fresh.named_parameters() if ROUTERS[0] in name]
        assert gates
        assert all(not trained[name].equal(dict(fresh.named_parameters())[name]) for name in gates)
        assert len(losses_of(run / "stages" / directory.name)) == 6, "half of the steps of the whole forest"


def test_a_schedule_of_its_own_is_what_it_is_trained_by(run: Path) -> None:
    """Without one the forest's is, which keeps its rate here."""
    theirs, ours = ([record["lr"] for record in records_of(run / "stages" / directory_of(run, n).name)] for n in (0, 1))
    assert theirs == [0.003] * 6
    assert ours == pytest.approx([0, 0, 1e-3, 1e-3, 7.5e-4, 5e-4])


def task_of(run: Path) -> Any:
    return load_config(run / "config.yaml").data.open(progress=False)


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 4)])
def test_experts_split_over_ranks_give_the_same_mixture(
    config: Path, run: Path, tmp_path: Path, ranks: int, size: int
) -> None:
    merges = [BTX_TOP_K | {"expert_parallel_size": size}]
    succeed(ranks, "train", "--run-dir", tmp_path / "run", config, f"recipe.merge={json.dumps(merges)}")
    ours, theirs = (read_model(newest_checkpoint(directory_of(one, 0))) for one in (tmp_path / "run", run))
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_transformers_loads_the_mixture_with_the_same_logits(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = directory_of(run, 0)
    (said,) = succeed(1, "export", directory, "--hf", tmp_path / "hf")
    assert said.out.startswith("MixtralForCausalLM of ")
    made, task = load_config(directory / "config.yaml"), task_of(run)
    ours = made.model.build(task.vocab_size, RunShape(SingleWorld(), 1))
    place_weights(ours, read_model(newest_checkpoint(directory)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    token_BS = task.test.batch(*[torch.arange(2).numpy()] * 2).token_BS
    with torch.no_grad():
        torch.testing.assert_close(theirs(token_BS).logits, ours.eval()(token_BS).predictions[0], rtol=1e-4, atol=1e-5)


def test_a_mixture_that_died_in_its_training_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    stage = again / "stages" / directory_of(again, 0).name
    for path in (newest_checkpoint(stage), directory_of(again, 0), again / "stages" / "evaluation"):
        shutil.rmtree(path)
    (stage / "result.json").unlink()
    assert newest_checkpoint(stage).name.endswith("4")
    succeed(1, "train", "--resume", again)
    ours, theirs = (read_model(newest_checkpoint(directory_of(one, 0))) for one in (again, run))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_text_is_written_by_the_mixture(run: Path) -> None:
    (said,) = succeed(1, "forest", "generate", run, "stir the", "--with", json.dumps(BTX_TOP_K), "--tokens", "5")
    assert said.out.strip()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.merge=[{name: btx, gate: {name: top_k, k: 9}}]"], "k=9"),
        (["recipe.merge=[{name: btx, expert_parallel_size: 3}]"], "parallel.expert_parallel_size=3"),
        (["recipe.merge=[{name: btx, moe_every: 3}]"], "moe_every=3 exceeds layers=2"),
        (["recipe.merge=[{name: btx, gate: {name: hash}, learns: gates}]"], "nothing to learn"),
        (["recipe.merge=[{name: btx, scheduler: {type: Warm}}]"], "deepspeed.scheduler.type=Warm"),
        (["recipe.merge=[btx]", "model.moe_every=1"], "has experts already"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_anything_is_trained(
    config: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    outcome = dist_moe(1, "train", "--run-dir", tmp_path / "run", config, *overrides)[0]
    assert outcome.code == 2
    assert message in outcome.err
    assert "recipe.merge" in outcome.err
    assert not (tmp_path / "run" / "stages").exists()


def test_a_mixture_that_was_not_trained_is_refused(run: Path) -> None:
    merge = merge_of("{name: btx, gate: softmax}")
    assert isinstance(merge, BTX)
    outcome = dist_moe(1, "forest", "evaluate", run, "--with", "{name: btx, gate: softmax}")[0]
    assert outcome.code == 2
    assert "has trained no such mixture" in outcome.err
