"""Do alarms about routing come within 50 steps of a fault, and never in a healthy run? By runs of ``dist-moe train``.

    python tools/alarm_study.py --report results/alarm.md

trains small models on four tasks with several gates. Into some a fault is planted at a known step
(tools/alarm_faults.py); the others are left alone. Which alarms came is read from what the run printed and from its
TensorBoard events. That a planted run really has its fault, and a healthy one none, is judged from the loads in
``metrics.jsonl`` by another measure than that of the alarms: the share of the rows that the ceil(m) busiest experts
have, at m experts per token (:func:`concentrations`).
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.monitor.run_directory import RunDirectory
from tools.studies import command_given, machine, out_and_err_of

STEPS, LIMIT, STRETCH = 160, 50, 20
"""Steps of a run, those within which an alarm must come, and those over which the study pools loads."""

COLLAPSED, UNEVEN, SOFT = 0.9, 0.8, 0.8
"""Concentrations from which on a layer is collapsed, and is not healthy; experts per token over all, of soft trees."""

TASKS: dict[str, tuple[str, list[str]]] = {
    "ratings": ("configs/movielens_small.yaml", ["train.batch_size=128"]),
    "words": (
        "configs/lm_small.yaml",
        [
            *("data.domains=[news, romance]", "data.vocab_size=512", "data.sequence_length=32", "train.batch_size=16"),
            *("model.dim=64", "model.experts.hidden=64", "model.dense_hidden=128", "model.permutation=null"),
        ],
    ),
    "images": (
        "configs/multi_fashion_mnist_small.yaml",
        ["data.train_examples=2000", "data.eval_examples=200", "model.num_experts=8", "train.batch_size=32"],
    ),
    "census": (
        "configs/census_home.yaml",
        [
            "model={name: mmoe, num_experts: 8, embedding_dim: 8, experts: {units: [32]}, tower_units: [16]}",
            "train.batch_size=256",
        ],
    ),
}
"""Configuration and overrides of each task: MovieLens, Brown, MultiFashionMNIST, Census-Income."""

LAST_LAYER = {"ratings": 0, "words": 1, "images": 0, "census": 0}
SEARCH = "search without effect"
COMMON = [
    *(f"train.max_steps={STEPS}", "train.epochs=100", "train.log_every=10", "train.patience=null"),
    *("train.validate_every=1000000", "train.checkpoint_every=1000000"),
]

GATES = {
    "Top-k": "{name: top_k, k: 2, balance_weight: 0.05}",
    "Top-1": "{name: top_k, k: 1, balance_weight: 0.1}",
    "Top-1, no loss": "{name: top_k, k: 1, scores: sigmoid, bias_update_rate: 0.01}",
    "AdaMoE": "{name: ada_moe, k: 3, null_slots: 8, balance_weight: 0.1}",
    "DSelect-k": "{name: dselect_k, k: 2}",
    "DSelect-k, no entropy loss": "{name: dselect_k, k: 2, entropy_weight: 0.0}",
    "COMET": "{name: comet, k: 2, gamma: 1.0, entropy_weight: 0.05, balance_weight: 0.1}",
    "COMET, no balance": "{name: comet, k: 2, gamma: 1.0, entropy_weight: 0.05}",
    "hash": "{name: hash}",
    "hash, balanced": "{name: hash, assignment: balanced}",
    "SMoE-Dropout": "{name: smoe_dropout}",
    "softmax": "{name: softmax}",
}


@dataclass(frozen=True)
class Case:
    """A run: of a task with a gate under ``overrides``; ``expected``: the kind of its alarm, None in healthy runs.

    ``planted_at``: the first step of the fault, counted from 1. ``is_sudden``: it is complete at once, else the run
    itself says when.
    """

    label: str
    task: str
    gate: str
    seed: int
    expected: str | None = None
    planted_at: int | None = None
    is_sudden: bool = True
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A name for files."""
        return re.sub(r"[^a-z0-9]+", "_", f"{self.label} {self.task} {self.gate} {self.seed}".lower())

    def words(self) -> list[str]:
        """Return the arguments of ``dist-moe train``, but for the run directory."""
        config, overrides = TASKS[self.task]
        gate = f"model.gate={GATES[self.gate]}"
        return [config, *overrides, *COMMON, gate, f"seed={self.seed}", *self.overrides]


@dataclass(frozen=True)
class Outcome:
    """Alarms of a run, and its own loads: ``alarms`` are (step, sentence).

    ``completed``: the first step from which, for a stretch, the last layer was collapsed. ``uneven``: the
    largest concentration of any layer and stretch, of its rows together or of its steps on average; both by the study's
    own measure. ``still_since``: the last step of a permutation search that moved nothing, as the run printed it.
    """

    alarms: list[tuple[int, str]]
    completed: int | None
    uneven: float
    still_since: int | None = None

    def first(self, kinds: Sequence[str], layer: int | None) -> int | None:
        """Return the step of the first alarm of one of the kinds, of a layer."""
        return next((step for step, sentence in self.alarms if _is_of(sentence, kinds, layer)), None)


def planted(kind: str, case: Case, **fields: int) -> Case:
    """Return the case with a fault of a kind of tools/alarm_faults.py at its onset."""
    fault = json_line({"name": "planted_fault", "kind": kind, "onset": case.planted_at, **fields})
    overrides = ("imports=[tools.alarm_faults]", f"callbacks=[{fault}]")
    return replace(case, overrides=(*case.overrides, *overrides), is_sudden=kind != "turned")


def _in_turn(label: str, expected: str, where: Sequence[tuple[str, str]], seeds: int, first: int) -> Iterator[Case]:
    """One seed each, over tasks and gates in turn, each with another onset, so that looks come at every distance."""
    for seed in range(seeds):
        task, gate = where[seed % len(where)]
        yield Case(label, task, gate, seed, expected, first + seed)


ALIKE = [
    ("ratings", "Top-k"),
    ("census", "AdaMoE"),
    ("ratings", "Top-1, no loss"),
    ("words", "Top-k"),
    ("census", "Top-1"),
]
TURNED = [("ratings", "Top-k"), ("census", "Top-k"), ("words", "Top-k"), ("ratings", "Top-1")]
NULL = [("ratings", "AdaMoE"), ("census", "AdaMoE"), ("words", "AdaMoE")]
CONFINED = [("ratings", "Top-k"), ("census", "Top-1"), ("words", "Top-k"), ("ratings", "Top-1, no loss")]
SLOTS = {"ratings": 5, "census": 3, "words": 4}
ALONE = [
    ("ratings", "COMET, no balance"),
    ("words", "DSelect-k"),
    ("ratings", "DSelect-k"),
    ("images", "COMET, no balance"),
    ("words", "Top-1"),
]
STILL = "model.permutation={epochs: 0.05, schedule: paper}"
MOVED = "model.permutation={epochs: 0.1, schedule: hot}"


def faulty_cases() -> list[Case]:
    """Return the runs with a fault."""
    return [
        *(planted("alike", case) for case in _in_turn("tokens made alike", "collapse", ALIKE, 20, 71)),
        *(planted("turned", case) for case in _in_turn("balance loss turned", "collapse", TURNED, 20, 51)),
        *(planted("null", case) for case in _in_turn("null slots preferred", "dead layer", NULL, 3, 75)),
        *(
            planted("confined", case, slots=SLOTS[case.task])
            for case in _in_turn("few slots left", "loss of balance", CONFINED, 4, 101)
        ),
        *(Case("nothing planted", *place, seed, "collapse", None, False) for seed, place in enumerate(ALONE)),
        *(Case("paper's temperatures", "ratings", "COMET", n, SEARCH, None, False, (STILL,)) for n in range(3)),
    ]


BALANCED = [gate for gate in GATES if gate not in ("COMET, no balance", "DSelect-k")]
HEALTHY = [
    *(("ratings", gate) for gate in BALANCED),
    *(("words", gate) for gate in ("Top-k", "AdaMoE", "hash", "hash, balanced")),
    *(("census", gate) for gate in ("Top-k", "COMET", "AdaMoE")),
    *(("images", gate) for gate in ("Top-k", "COMET")),
]


def healthy_cases() -> list[Case]:
    """Return twenty runs without a fault; the last learns a permutation that moves."""
    cases = [Case("healthy", task, gate, 100 + i) for i, (task, gate) in enumerate(HEALTHY)]
    return [*cases, Case("healthy, a search that moves", "ratings", "Top-k", 100 + len(cases), overrides=(MOVED,))]


def alarms_of(run_dir: Path) -> list[tuple[int, str]]:
    """Return step and sentence of every alarm among the TensorBoard events of a run."""
    board = EventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()
    if "alarm/text_summary" not in board.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in board.Tensors("alarm/text_summary")]


def outcome(case: Case, run_dir: Path, screen: str) -> Outcome:
    """Return what a run showed. Raises SystemExit if its screen and TensorBoard do not have the same alarms, once."""
    alarms = alarms_of(run_dir)
    told = [line for line in screen.splitlines() if "ALARM" in line]
    if told != [sentence for _, sentence in alarms]:
        raise SystemExit(f"{run_dir}: TensorBoard has the alarms {alarms}, the screen {told}")
    lines = RunDirectory(run_dir).metrics.read_text(encoding="utf-8").splitlines()
    records = [record for record in map(parse_json, lines) if "load" in record]
    within_SL = np.stack([concentrations(pooled([one])) for one in records])
    stretches = [slice(start, start + STRETCH) for start in range(0, len(records) - STRETCH + 1, STRETCH)]
    over = [concentrations(pooled(records[stretch])).max() for stretch in stretches]
    within = [within_SL[stretch].mean(axis=0).max() for stretch in stretches]
    still = re.search(r"permutation search until step (\d+): 0 of", screen)
    return Outcome(
        alarms,
        completed_at(within_SL[:, LAST_LAYER[case.task]]),
        float(max(over + within)),
        int(still[1]) if still else None,
    )


def pooled(records: Sequence[dict[str, Any]]) -> list[tuple[NDArray[np.float64], float]]:
    """Return the rows of each expert, and the tokens, of some steps; an entry for each layer."""
    tokens = sum(record["tokens"] for record in records)
    return [
        (np.sum(load_SE, axis=0, dtype=float), tokens)
        for load_SE in zip(*(one["load"] for one in records), strict=True)
    ]


def concentrations(loads: Iterable[tuple[NDArray[np.float64], float]]) -> NDArray[np.float64]:
    """Return (S - s) / (1 - s): S the share of the rows of the ceil(m) busiest of E experts, s = ceil(m) / E if even.

    0 if the load is even, 1 if all tokens have the same experts; 0 without rows, and where trees are soft.
    """
    found = []
    for load_E, tokens in loads:
        per_token = load_E.sum() / tokens
        count = math.ceil(per_token - 1e-9)
        even, is_judged = count / len(load_E), 0 < per_token <= SOFT * len(load_E) and count < len(load_E)
        share = np.sort(load_E)[::-1][:count].sum() / load_E.sum() if is_judged else 0.0
        found.append((share - even) / (1 - even) if is_judged else 0.0)
    return np.asarray(found)


def completed_at(share_S: NDArray[np.float64]) -> int | None:
    """Return the first step, counted from 1, that is collapsed and begins a stretch of steps that are so on average."""
    for start in range(len(share_S) - STRETCH + 1):
        if min(share_S[start], share_S[start : start + STRETCH].mean()) >= COLLAPSED:
            return start + 1
    return None


KINDS = {"collapse": ("collapse", "collapse within steps")}
ALONG = {"collapse": ("loss of balance",)}
"""Kinds of alarms that tell of a fault, and those that it may bring along: a layer that collapses loses its balance."""


@dataclass(frozen=True)
class Verdict:
    """``delay``: steps from the onset to the alarm, None if none came or none was due; ``wrong``: what should not be.

    Wrong are a missing or late alarm, one before the onset, of another kind or layer, any in a healthy run, and a run
    that does not have the fault, or the health, for which it stands.
    """

    delay: int | None
    wrong: list[str]


def _is_of(sentence: str, kinds: Sequence[str], layer: int | None) -> bool:
    where = "" if layer is None else f"MoE layer {layer} "
    return any(f": {kind}: {where}" in sentence for kind in kinds)


def judge(case: Case, seen: Outcome) -> Verdict:
    """Compare the alarms of a run with its fault."""
    if case.expected is None:
        wrong = [sentence for _, sentence in seen.alarms]
        return Verdict(None, wrong + [f"its concentration is {seen.uneven:.2f}"] * (seen.uneven >= UNEVEN))
    onset = case.planted_at if case.is_sudden else seen.still_since if case.expected == SEARCH else seen.completed
    if onset is None or (case.expected == "collapse" and seen.completed is None):
        return Verdict(None, ["the run does not have its fault"])
    onset = max(onset, case.planted_at or 0)  # a stretch that ends collapsed may begin before
    layer = None if case.expected == SEARCH else LAST_LAYER[case.task]
    kinds = KINDS.get(case.expected, (case.expected,))
    alarm = seen.first(kinds, layer)
    due = alarm is not None and alarm - onset <= LIMIT
    wrong = [] if due else [f"no alarm within {LIMIT} steps of step {onset}"]
    if case.planted_at is not None:
        own = (*kinds, *ALONG.get(case.expected, ()))
        wrong += [one for step, one in seen.alarms if step < case.planted_at or not _is_of(one, own, layer)]
    return Verdict(None if alarm is None else alarm - onset, wrong)


def page(seen: dict[Case, Outcome]) -> str:
    """Return Markdown: what became of the faults, by kind, task and gate, and of each healthy run."""
    verdicts = {case: judge(case, one) for case, one in seen.items()}
    healthy = [case for case in seen if case.expected is None]
    faulty = [case for case in seen if case.expected is not None]
    silent = sum(not seen[case].alarms for case in healthy)
    lines = [
        "# Alarms in runs with and without faults",
        "",
        f"`{command_given()}`: `dist-moe train` for {STEPS} steps on one rank, `train.log_every` 10; {machine()}, no "
        "GPU. "
        "Read from the screen and from the TensorBoard events of each run, which have the same alarms. A planted fault "
        "is in the last MoE layer from its onset on (`tools/alarm_faults.py`), at another step for every seed. Where "
        "nothing is planted, or the balance loss has got a negative weight so that the optimizer draws the tokens "
        f"together, the onset is the first of {STRETCH} steps in which few experts have nearly all rows of a step "
        f"(concentration at least {COLLAPSED} on average); an alarm that comes as the layer is about to collapse is "
        "earlier than that. Of a search it is its last step. Right: the alarm named the kind and the layer, within "
        f"{LIMIT} steps, with none before the fault was planted and no other fault named.",
        "",
        "| alarm | fault | task, gate | seeds | right | steps from the onset to the alarm: least, median, most |",
        "| --- | --- | --- | --- | --- | --- |",
        *_rows(faulty, verdicts),
        "",
        f"{len(healthy)} healthy runs, no alarm in {silent}. Concentration: (S - s) / (1 - s), where S is the share of "
        "the rows that the ceil(m) busiest of E experts have, at m experts per token, and s = ceil(m) / E; the largest "
        f"over layers and stretches of {STRETCH} steps, of all rows or of each step on average, soft trees "
        f"(m > {SOFT} E) aside; 0 where the load is even, 1 where all tokens have the same experts.",
        "",
        "| task | gate | seed | concentration | alarms |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {case.task} | {case.gate}{', permutation search' * bool(case.overrides)} | {case.seed} "
            f"| {seen[case].uneven:.2f} | {len(seen[case].alarms)} |"
            for case in healthy
        ),
    ]
    wrong = [f"- {case.name}: {one}" for case, verdict in verdicts.items() for one in verdict.wrong]
    return "\n".join([*lines, *(["", "Not as it should be:", "", *wrong] if wrong else []), ""])


def _rows(cases: Sequence[Case], verdicts: dict[Case, Verdict]) -> Iterator[str]:
    """Lines of one fault: by task and gate, and together if there are several."""

    def line(fault: str, where: str, group: Sequence[Case]) -> str:
        delays = [delay for case in group if (delay := verdicts[case].delay) is not None]
        spread = f"{min(delays)}, {statistics.median(delays):g}, {max(delays)}" if delays else "-"
        right = sum(not verdicts[case].wrong for case in group)
        return f"| {group[0].expected} | {fault} | {where} | {len(group)} | {right} | {spread} |"

    for fault, together in groupby(cases, lambda case: case.label):
        group = list(together)
        places = list(dict.fromkeys((case.task, case.gate) for case in group))
        for place in places:
            yield line(fault, ", ".join(place), [case for case in group if (case.task, case.gate) == place])
        if len(places) > 1:
            yield line(fault, "together", group)


def study(cases: Sequence[Case], runs: Path) -> dict[Case, Outcome]:
    """Run the cases one after another; what a run printed stays beside its directory, and none is repeated."""
    seen = {}
    for case in cases:
        run, screen = runs / case.name, runs / f"{case.name}.txt"
        if not screen.exists():
            screen.parent.mkdir(parents=True, exist_ok=True)
            screen.write_text(out_and_err_of("train", *case.words(), "--run-dir", run)[1], encoding="utf-8")
        seen[case] = outcome(case, run, screen.read_text(encoding="utf-8"))
        print(f"{case.name}: {judge(case, seen[case])}", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/alarm.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/alarm"), help="where the runs are kept")
    options = parser.parse_args()
    seen = study([*healthy_cases(), *faulty_cases()], options.runs)
    options.report.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
