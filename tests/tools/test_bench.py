"""The benchmark measures what it says, and nothing that is not equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dist_moe.cli.main import main as command
from dist_moe.errors import UserError
from dist_moe.parallel import SingleWorld, World
from tests.helpers.worlds import on_real_worlds
from tools.bench import exchange, jobs, layer, memory, ours, ragged, regression, report, selection
from tools.bench import main as bench
from tools.bench.candidate import Candidate, step
from tools.bench.equal import differences, expected, unequal
from tools.bench.jobs import Job, JobFailed
from tools.bench.layer import CANDIDATES, LIMIT, OURS, Effort, Place
from tools.bench.limit import Needed, Products
from tools.bench.regression import Ratio
from tools.bench.timing import Spread, interleaved, ratio
from tools.bench.workloads import Material, Workload, loads, material

SMALL = Workload(64, 32, 8, 2)
WHOLE = slice(0, SMALL.experts)


@pytest.mark.parametrize(("experts", "violation"), [(8, 0.0), (8, 0.2), (64, 1.0), (64, 4.0), (256, 4.0)])
def test_loads_have_the_violation_that_was_asked_for(experts: int, violation: float) -> None:
    tokens, k = 8192, 2
    load_E = loads(tokens * k, experts, violation, tokens, torch.Generator().manual_seed(0))
    mean = tokens * k / experts
    assert sum(load_E) == tokens * k
    assert max(load_E) / mean - 1 == pytest.approx(violation, abs=1.01 / mean)
    if violation >= 1:
        logs = torch.tensor([math.log(max(load, 1)) for load in load_E])
        assert logs.std() > 0.2, "log-normal, not one heavy expert among equals"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("violation", [0.0, 2.5])
def test_every_router_chooses_the_same_experts(dtype: str, violation: float) -> None:
    workload = replace(SMALL, dtype=dtype, max_violation=violation)
    given = material(workload)
    chosen_TK = (given.x_TD @ given.router_ED.T).topk(workload.k).indices  # in the precision of the workload
    assert torch.equal(chosen_TK.sort().values, given.expert_TK.sort().values)
    assert (given.expert_TK.sort().values.diff(dim=1) > 0).all(), "no expert twice for a token"
    load_E = torch.bincount(given.expert_TK.flatten(), minlength=workload.experts)
    assert load_E.max() == 16 * (1 + violation)


def test_ranks_share_weights_and_have_tokens_of_their_own() -> None:
    workload = replace(SMALL, ranks=2, empty_rank=True)
    first, second = (material(replace(workload, empty_rank=False), rank) for rank in range(2))
    assert torch.equal(first.up_EDF, second.up_EDF)
    assert not torch.equal(first.x_TD, second.x_TD)
    assert [len(material(workload, rank).x_TD) for rank in range(2)] == [64, 0]
    assert not torch.equal(first.up_EDF, material(workload, 0, seed=1).up_EDF)


@pytest.mark.parametrize(
    "workload", [replace(SMALL, max_violation=4.0), replace(SMALL, experts=64), replace(SMALL, ranks=3)]
)
def test_an_impossible_workload_is_refused(workload: Workload) -> None:
    with pytest.raises(ValueError, match=r"experts|violation"):
        material(workload)


@pytest.mark.parametrize("k", [1, 2])
def test_what_is_expected_is_the_dense_mixture(k: int) -> None:
    workload = replace(SMALL, k=k, dtype="float64", max_violation=1.0)
    given = material(workload)
    leaves = [t.clone().requires_grad_() for t in (given.x_TD, given.router_ED)]
    weights = [t.clone().requires_grad_() for t in (given.gate_EDF, given.up_EDF, given.down_EFD)]
    probability_TE = (leaves[0] @ leaves[1].T).softmax(1)
    kept_TE = torch.zeros_like(probability_TE).scatter(1, probability_TE.topk(k).indices, 1.0) * probability_TE
    mixture_TE = kept_TE if k == 1 else kept_TE / kept_TE.sum(1, keepdim=True)
    gate, up, down = weights
    results_ETD = (F.silu(leaves[0] @ gate) * (leaves[0] @ up)) @ down
    output_TD = torch.einsum("te,etd->td", mixture_TE, results_ETD)
    grads = torch.autograd.grad(output_TD, [*leaves, *weights], given.cotangent_TD)
    wanted = dict(zip(("output", "x", "router", "gate", "up", "down"), (output_TD, *grads), strict=True))
    found = expected(workload, given).tensors
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-9, atol=1e-10)


class LosesARow(ours.OurLayer):
    """One token gets no output."""

    def forward(self, x_TD: Tensor) -> Tensor:
        kept_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
        kept_T1[3] = 0
        return super().forward(x_TD) * kept_T1


class ForgetsTheRouter(ours.OurLayer):
    """Right forward, without a gradient for the router."""

    def gradients(self) -> dict[str, Tensor]:
        grads = super().gradients()
        return grads | {"router": torch.zeros_like(grads["router"])}


class HasAWrongExpert(ours.OurLayer):
    """An expert's weights are a little off."""

    def __init__(self, workload: Workload, given: Material, world: World) -> None:
        super().__init__(workload, given, world)
        with torch.no_grad():
            self.moe.experts.down[5] *= 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [LosesARow, ForgetsTheRouter, HasAWrongExpert])
def test_a_wrong_layer_is_not_equal(wrong: type[ours.OurLayer], dtype: str) -> None:
    workload = replace(SMALL, dtype=dtype)
    given = material(workload)
    wanted = expected(workload, given)
    right = differences(ours.OurLayer(workload, given, SingleWorld()), given, wanted)
    assert unequal(workload, right) is None
    reason = unequal(workload, differences(wrong(workload, given, SingleWorld()), given, wanted))
    assert reason is not None
    assert reason.startswith("unequal: ")


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    candidates: dict[str, Callable[[], object]] = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(candidates, 3, before_each=lambda: calls.append("|"))
    assert "".join(calls) == "|a|b|c|b|c|a|c|a|b|a|b|c"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == Spread(0.5, 0.5, 0.5)


def test_the_limit_is_the_products_that_are_needed() -> None:
    given = material(SMALL)
    rows = torch.bincount(given.expert_TK.flatten(), minlength=SMALL.experts).tolist()
    products = Products(SMALL, given, rows, WHOLE)
    ways = products.ways()
    assert "bmm" in ways
    needed = Needed.of(SMALL, sum(rows), SMALL.tokens, SMALL.experts)
    results = {}
    for name, way in ways.items():
        for out in (products.out_ND, products.grad_down, products.grad_router_DE, products.out_TD):
            out.zero_()
        with FlopCounterMode(display=False) as counted:
            way()
        assert counted.get_total_flops() == needed.flops, name
        in_one = "in one" in name  # has gradients of its own for gate and up
        results[name] = [products.grad_down.clone(), products.grad_router_DE.clone(), products.out_TD.clone()] + (
            [] if in_one else [products.out_ND.clone(), products.grad_weight.clone()]
        )
    for name, found in results.items():
        for one, other in zip(found, results["loop"], strict=False):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


def test_the_limit_of_uneven_groups_has_no_batched_product() -> None:
    given = material(replace(SMALL, max_violation=1.0))
    rows = torch.bincount(given.expert_TK.flatten(), minlength=SMALL.experts).tolist()
    assert "bmm" not in Products(SMALL, given, rows, WHOLE).ways()


def test_memory_is_the_peak_not_the_sum() -> None:
    def two_after_each_other() -> None:
        for _ in range(3):
            one = torch.empty(2**20, dtype=torch.uint8)
            other = torch.empty(2**19, dtype=torch.uint8)
            del one, other

    found = memory.measure(two_after_each_other)
    assert found.largest == 2**20
    assert 1.5 * 2**20 <= found.peak < 1.6 * 2**20


def test_ours_needs_no_table_of_tokens_experts_and_capacity() -> None:
    workload = Workload(1024, 64, 16, 2)
    given = material(workload)
    found = memory.of_layer(ours.OurLayer(workload, given, SingleWorld()), given)
    capacity = workload.tokens * workload.k // workload.experts
    assert found.largest < workload.tokens * workload.experts * capacity * torch.float32.itemsize


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_shares_of_the_ragged_study(share: float) -> None:
    wanted_TK = ragged.wanted(128, 8, share, seed=0)
    assert wanted_TK.sum() == share * 128 * 8
    assert wanted_TK[:, 0].all(), "every token has an expert"
    assert torch.equal(wanted_TK.int().diff(dim=1) <= 0, torch.ones(128, 7, dtype=torch.bool)), "first places first"


def test_slope_is_one_where_it_is_proportional() -> None:
    assert ragged.slope([1.0, 0.5, 0.25], [8.0, 4.0, 2.0]) == pytest.approx(1)
    assert ragged.slope([1.0, 0.5, 0.25], [8.0, 8.0, 8.0]) == pytest.approx(0)


def of_layer(world: World, workloads: list[Workload]) -> list[dict[str, Any]]:
    return [layer.measure(workload, Effort(seconds=0), Place(world)) for workload in workloads]


def test_all_candidates_that_are_here_are_equal_on_one_rank() -> None:
    workloads = [SMALL, replace(SMALL, k=1, max_violation=1.0), replace(SMALL, k=4, dtype="bfloat16")]
    for measured in on_real_worlds(1, of_layer, workloads)[0]:
        workload = Workload(**measured["workload"])
        unfit = {c.name for c in CANDIDATES if c.missing() or c.unfit(workload)}
        assert measured["left_out"].keys() == unfit
        timed = {name for batch in measured["batches"] for name in batch}
        assert timed == {c.name for c in CANDIDATES} - unfit | {LIMIT}
        assert {len(taken) for batch in measured["batches"] for taken in batch.values()} == {layer.FEWEST}


def test_candidates_are_equal_on_two_ranks() -> None:
    workload = replace(SMALL, ranks=2, max_violation=1.0)
    of_ranks = on_real_worlds(2, of_layer, [workload])
    assert of_ranks[0][0]["left_out"] == of_ranks[1][0]["left_out"]
    unfit = {c.name for c in CANDIDATES if c.missing() or c.unfit(workload)}
    assert of_ranks[0][0]["left_out"].keys() == unfit
    assert of_ranks[0][0]["batches"][0].keys() > {OURS, LIMIT, "DeepSpeed AutoEP, loop"}


def of_a_wrong_candidate(world: World) -> dict[str, Any]:
    before = layer.CANDIDATES
    layer.CANDIDATES = (before[0], Candidate("wrong", HasAWrongExpert))
    try:
        return layer.measure(SMALL, Effort(seconds=0), Place(world))
    finally:
        layer.CANDIDATES = before


def test_what_is_not_equal_is_not_timed() -> None:
    (measured,) = on_real_worlds(1, of_a_wrong_candidate)
    assert measured["left_out"]["wrong"].startswith("rank 0: unequal: output by")
    assert all("wrong" not in batch for batch in measured["batches"])


def other_studies(world: World) -> dict[str, dict[str, Any]]:
    place = Place(world)
    of_ranks = replace(SMALL, ranks=world.size)
    made = {
        "ragged": ragged.study(Job("ragged", replace(of_ranks, k=4)), place),
        "exchange": exchange.study(Job("exchange", of_ranks, seconds=0), place),
    }
    return {Job(study, Workload(**found["workload"])).name: found for study, found in made.items()}


@pytest.fixture(scope="module")
def measured_on_two_ranks() -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = on_real_worlds(2, other_studies)[0]
    return results


def test_bytes_of_the_ragged_layer_follow_its_assignments(measured_on_two_ranks: dict[str, dict[str, Any]]) -> None:
    (found,) = report.of_study(measured_on_two_ranks, "ragged").values()
    of_ragged = {m["share"]: m["wire_bytes"] for m in found["measured"] if m["kind"] == "ragged"}
    of_padded = {m["wire_bytes"] for m in found["measured"] if m["kind"] == "padded"}
    assert ragged.slope(list(of_ragged), list(map(float, of_ragged.values()))) == pytest.approx(1, abs=0.15)
    assert of_padded == {of_ragged[1.0]}, "whatever the share"


def test_the_report_reads_back(tmp_path: Path, measured_on_two_ranks: dict[str, dict[str, Any]]) -> None:
    taken = {LIMIT: [1.0, 2.0], OURS: [2.0, 4.0], "DeepSpeed MoE, dropless": [3.0, 6.0]}
    of_layers = {
        "workload": {},
        "batches": [taken],
        "left_out": {"FairScale MOELayer": "fp32 only"},
        "errors": {OURS: 1e-7},
        "limit": {"way": "bmm", "ways": {}},
        "needed": {"roofline_s": 0.5},
    }
    results = {"layer/some": of_layers} | measured_on_two_ranks
    report.write(tmp_path, {"seed": 3, "machine": "a machine"}, results)
    assert report.read(tmp_path) == json.loads(
        json.dumps({"about": {"seed": 3, "machine": "a machine"}, "results": results})
    )
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "| some | 2.00 (2.00-2.00) | 2.00 |" in text
    assert "1.50 (1.50-1.50)" in text
    assert "1. fp32 only" in text
    assert "## Ragged against padded" in text
    assert "## The exchange" in text
    assert (tmp_path / report.PICTURE).stat().st_size > 1000


def test_a_candidate_that_kills_its_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(job: Job, say: Callable[[str], None]) -> dict[str, Any]:
        tried.append(job.excluded)
        if not job.excluded:
            raise JobFailed("peer", "exit code -6")
        return {"left_out": job.excluded}

    monkeypatch.setattr(jobs, "_run", run)
    assert jobs.run(Job("layer", SMALL), ("peer",), print)["left_out"] == {"peer": "fails: exit code -6"}
    assert len(tried) == 2
    with pytest.raises(JobFailed, match="exit code -6"):
        jobs.run(Job("layer", SMALL), ("another",), print)


def test_the_command_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [Job("layer", SMALL, seconds=0, candidates=("padded",))]
    monkeypatch.setattr(selection, "jobs", lambda *_: tiny)
    assert command(["bench", "--output", str(tmp_path)]) == 0
    assert "measured already" not in capsys.readouterr().out
    found = report.read(tmp_path)
    (measured,) = found["results"].values()
    assert set(measured["batches"][0]) == {LIMIT, OURS, "ours, padded (T, K)"}
    assert found["about"]["command"] == f"dist-moe bench --output {tmp_path}"
    assert "deepspeed 0." in (tmp_path / report.MARKDOWN).read_text()
    assert command(["bench", "--output", str(tmp_path)]) == 0
    assert "measured already" in capsys.readouterr().out
    assert command(["bench", "--seed", "1", "--output", str(tmp_path)]) == 2, "figures of another seed lie there"


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(JobFailed, match=r"ours: NotImplementedError: .*Float8_e4m3fn"):
        jobs.run(Job("layer", replace(SMALL, dtype="float8_e4m3fn")), (), print)


def test_ratios_above_their_spread_are_named() -> None:
    committed = {"a": Ratio(1.0, 0.9, 1.1), "b": Ratio(2.0, 1.5, 2.5)}
    assert regression.slower({"a": Ratio(1.09, 1, 2), "b": Ratio(0.5, 0.4, 0.6)}, committed) == {}
    assert len(regression.slower({"a": Ratio(1.2, 1, 2), "b": Ratio(2.0, 1, 2), "c": Ratio(1, 1, 1)}, committed)) == 2


@pytest.mark.parametrize(("second", "code"), [(1.0, 0), (1.2, 1)])
def test_a_check_fails_only_where_a_ratio_is_outside_twice(
    second: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([{"a": Ratio(1.2, 1, 2), "b": Ratio(1, 1, 1)}, {"a": Ratio(second, 1, 2), "b": Ratio(3, 3, 3)}])
    monkeypatch.setattr(regression, "read", lambda: dict.fromkeys("ab", Ratio(1.0, 0.9, 1.1)))
    monkeypatch.setattr(regression, "measure", lambda *_: next(measured))
    assert bench.check(bench.Options()) == code


def test_committed_ratios_read_back(tmp_path: Path) -> None:
    found = {"a": Ratio(1.0, 0.9, 1.1)}
    regression.write(found, {"seed": 0}, tmp_path / "ratios.json")
    assert regression.read(tmp_path / "ratios.json") == found
    with pytest.raises(UserError, match="--commit-ratios"):
        regression.read(tmp_path / "none.json")


def test_selections_hold_no_impossible_workload_and_no_job_twice() -> None:
    for scope in selection.SCOPES:
        chosen = selection.jobs(scope, 1.0, 0, ())
        assert [job.name for job in chosen if job.workload.impossible()] == []
        assert len({job.name for job in chosen}) == len(chosen)
    assert {job.study for job in selection.jobs("default", 1.0, 0, ())} == {"layer", "memory", "ragged", "exchange"}


def test_a_part_that_no_job_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"--only nonsense: no job.*\n.*layer/t2048"):
        bench.run(bench.Options(only=("nonsense",)))


def test_without_a_checkout_the_command_says_where_benchmarks_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dist_moe.__file__", str(tmp_path / "dist_moe" / "__init__.py"))
    assert command(["bench"]) == 2
    assert "benchmarks live in the repository" in capsys.readouterr().err


def test_what_is_not_installed_says_how_to_install_it() -> None:
    candidate = Candidate("some", ours.OurLayer, packages=(("no_such_module", "no-such-package>=1"),))
    assert candidate.missing() == "not installed: pip install no-such-package>=1"


def test_a_step_allocates_gradients_anew() -> None:
    given = material(SMALL)
    made = ours.OurLayer(SMALL, given, SingleWorld())
    first = [step(made, given.x_TD, given.cotangent_TD)[1], *(t.clone() for t in made.gradients().values())]
    again = [step(made, given.x_TD, given.cotangent_TD)[1], *made.gradients().values()]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other), "not added to those of the step before"
    assert not given.x_TD.requires_grad
    assert not isinstance(given.router_ED, nn.Parameter)
