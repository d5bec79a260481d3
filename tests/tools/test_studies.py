"""The studies of language models and of BERT train every run once, and write tables with metrics of these runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.data.graphs.tiny_graphs import tiny_graph, write_tiny_cora
from tests.data.labelled_text.tiny_texts import write_messages
from tests.helpers.board import read_board
from tests.helpers.commands import finish, start
from tests.helpers.text_runs import write_encoder, write_text_config
from tests.helpers.texts import DOMAINS, write_lm_config
from tools import branch_clock_study, compress_study, forest_study, lm_clock_study
from tools.bert_study import SEARCH_STEPS
from tools.studies import StudyRun, command_given, directory_name, spread


def cells_of(table: Path) -> dict[str, list[str]]:
    """The rows of its Markdown tables by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_spread_and_directory_names() -> None:
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert spread([0.25], 1) == "0.2"
    assert directory_name("Top-k + balance loss", "seed0") == "top-k_+_balance_loss-seed0"
    assert directory_name("Mowst*, gcn", 0) == "mowst_star,_gcn-0"


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)train .*nowhere.yaml.*nowhere.yaml"):
        StudyRun(tmp_path / "run", tmp_path / "nowhere.yaml", ()).train()


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path: Path) -> None:
    config = Path("configs/lm_small.yaml")
    (tmp_path / "config.yaml").write_text(config.read_text())
    (tmp_path / "summary.json").write_text("{}")
    StudyRun(tmp_path, config, ()).train()
    with pytest.raises(SystemExit, match=r"has a run with another configuration: seed=1, not 0; name another"):
        StudyRun(tmp_path, config, ("seed=1",)).train()


def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["here/lm_study.py", "model.gate={name: hash}", "--runs", "there", "--seeds", "2", "--at-once=1"]
    monkeypatch.setattr(sys, "argv", given)
    assert command_given() == "python tools/lm_study.py 'model.gate={name: hash}' --seeds 2"


def test_a_table_of_compressed_models(tmp_path: Path) -> None:
    options = argparse.Namespace(
        bases=["BERT, 8 experts"], shares=[0.25], recovered=[0.25], methods=list(compress_study.METHODS), seeds=3
    )
    cells = list(compress_study.all_cells(options))
    assert len(cells) == 2 + 8 + 9, "MC-SMoE is made while it recovers"
    rows = {
        (cell, seed): compress_study.Row(90 - i + 0.01 * seed * i, 1000, 2.0, 0.5)
        for i, cell in enumerate(cells)
        for seed in range(3)
    }
    table = compress_study.page(cells, rows, options)
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert "As trained: 90.0000 ± 0.0000; trained on, as long as the others recover: 89.0100 ± 0.0100" in table
    assert "(+4.95" in lines["random groups"], "against M-SMoE, five cells on"
    assert lines["random groups"].count("*") == 2
    assert lines["M-SMoE (router logits)"].count("(") == 1, "it is what others are compared with"
    assert lines["MC-SMoE"].startswith("| MC-SMoE |  | ")
    options.recovered, merged = [], [cell for cell in cells if not cell.recovered or cell.share == 1]
    assert list(compress_study.all_cells(options)) == merged
    assert "MC-SMoE |" not in compress_study.page(merged, rows, options)
    compress_study.draw(merged, {each: row for each, row in rows.items() if each[0] in merged}, options, tmp_path / "a")
    compress_study.draw(cells, rows, options, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_table_of_forests(tmp_path: Path) -> None:
    options = argparse.Namespace(only=["domains", "random 8"], seeds=2)
    labels = {"domains": ["twin", "ensemble", "ensemble, prior cached", "ensemble, prior cached, top_k 2", "average"]}
    labels["domains"] += ["average, weights cached", "btx top_k", "btx comet, max_active 2"]
    labels["domains"] += ["btx top_k, share 0.5", "btx comet, max_active 2, share 0.5"]
    labels["random 8"] = ["ensemble"]
    reports = {
        (run, seed): {
            "bits_per_byte": {
                label: dict.fromkeys((forest_study.TRAINED_ON, forest_study.HELD_OUT), 2 + 0.1 * i + 0.01 * seed)
                for i, label in enumerate(of_run)
            },
            "experts_per_token": dict.fromkeys(of_run, 1.0),
            "flops_per_token": dict.fromkeys(of_run, 3.5e6),
        }
        for run, of_run in labels.items()
        for seed in range(2)
    }
    table = forest_study.page(reports, options)
    assert "| dense, all domains | 2.0050 ± 0.0071 | 2.0050 ± 0.0071 | 1.0 | 3.50 |" in table
    assert "| BTX, COMET | 2.7050 ± 0.0071 (+0.7000: +0.7000 to +0.7000 *)" in table
    assert "c-BTM" not in table.split("| --- |")[1], "its run was not asked for"
    forest_study.draw(reports, options, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_table_of_clocks() -> None:
    page = branch_clock_study.table([(30.0, 20.0), (24.0, 20.0), (26.0, 20.0)])
    assert "| 2 | 1.20 |" in page
    assert "Median 1.30, from 1.20 to 1.50." in page


def test_when_a_curve_reaches_a_loss() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    found = [lm_clock_study.reached(curve, loss) for loss in (6.0, 5.0, 4.25, 4.0, 3.9, 3.0, 2.9)]
    assert found == [10, 10, 17.5, 20, 34.0, 40, None]
    assert lm_clock_study.share(curve, [(10, 9.0), (40, 4.25)]) == 17.5 / 40
    assert lm_clock_study.shown([0.5, 0.75, 1.0]) == "0.75 (0.50 to 1.00)"
    assert lm_clock_study.shown([0.5, None]) == "0.50 (0.50 to 0.50), never by 1 of 2 seeds"
    assert lm_clock_study.shown([None]) == "never by 1 of 1 seeds"


@pytest.mark.slow
def test_the_clock_of_language_models(tmp_path: Path, tiny_text: dict[str, str]) -> None:
    config = write_lm_config(tmp_path, tiny_text, train={"max_steps": 6})
    command = ["tools/lm_clock_study.py", "--config", config, "--seeds", 2, "--variants", "dense twin", "Hash"]
    places = ["--runs", tmp_path / "runs", "--report", tmp_path / "clock.md", "--validate-every", 2, "--rounds", 2]
    outcome = finish(start(sys.executable, *command, *places))
    assert outcome.code == 0, outcome.err
    rows = cells_of(tmp_path / "clock.md")
    assert rows["dense twin"][1:] == ["1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)"]
    assert re.match(r"0\.\d\d|1\.00|never", rows["Hash"][1])
    metrics = (tmp_path / "runs/hash-seed1/metrics.jsonl").read_text().splitlines()
    assert sum("validation" in json.loads(line) for line in metrics) >= 2


@pytest.mark.slow
def test_the_clock_of_branches(tmp_path: Path, tiny_text: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"moe_every": 0, "permutation": None}
    forest = {"name": "branch_train_merge", "partition": {"domains": list(DOMAINS)}}
    config = write_lm_config(tmp_path, tiny_text, recipe=forest, model=model)
    monkeypatch.setattr(branch_clock_study, "DOMAINS", DOMAINS)
    branches, twin = branch_clock_study.examples_per_second(argparse.Namespace(steps=16, config=config, overrides=[]))
    assert branches > 0
    assert twin > 0


@pytest.mark.slow
def test_language_models(tmp_path: Path, tiny_text: dict[str, str]) -> None:
    config = write_lm_config(tmp_path, tiny_text, train={"max_steps": 4})
    command = ["tools/lm_study.py", "--config", config, "--seeds", 1, "--variants", "dense twin", "SMoE-Dropout"]
    places = ["--runs", tmp_path / "runs", "--report", tmp_path / "report"]
    outcome = finish(start(sys.executable, *command, *places))
    assert outcome.code == 0, outcome.err
    rows = cells_of(tmp_path / "report" / "table.md")
    test = json.loads((tmp_path / "runs/dense_twin-seed0/summary.json").read_text())["test"]
    assert rows["dense twin"][0] == f"{test['bits_per_byte']:.4f}"
    assert [rows[f"SMoE-Dropout, evaluated at k = {k}"][1] for k in (1, 2, 4)] == ["1.00", "2.00", "4.00"]
    assert rows["SMoE-Dropout"][0] == rows["SMoE-Dropout, evaluated at k = 4"][0]
    again = finish(start(sys.executable, *command, *places))
    assert again.out.count("trained already") == 2
    assert (tmp_path / "report" / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_comet_bert(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", hidden=1536)
    data = {"name": "sms-spam", "root": str(write_messages(tmp_path / "raw", count=200))}
    sections = {"start": {"importance_examples": 16}, "distillation": {"teacher": "of the study"}}
    config = write_text_config(tmp_path, encoder, data, **sections, train={"max_steps": SEARCH_STEPS + 1})
    command = ["tools/bert_study.py", "model.moe_every=1", "--config", config, "--seeds", 1, "--tasks", "sms-spam"]
    outcome = finish(start(sys.executable, *command, "--runs", tmp_path / "runs", "--report", tmp_path / "report"))
    assert outcome.code == 0, outcome.err
    rows = cells_of(tmp_path / "report" / "table.md")
    f1 = json.loads((tmp_path / "runs/sms-spam-top-1-seed0/summary.json").read_text())["test"]["f1"]
    assert rows["Top-1"] == [f"{100 * f1:.1f}", "1.00"]
    assert rows["dense student"][1] == "0.00"
    for name, searched in (("comet", False), ("comet+,_swaps", True)):
        tags = read_board(tmp_path / f"runs/sms-spam-{name}-seed0").Tags()["scalars"]
        assert any(tag.startswith("swap_search") for tag in tags) == searched
    assert {"importance", "random", "inverse"} < set(rows)


@pytest.mark.slow
def test_mowst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    content = yaml.safe_load(Path("configs/mowst_cora.yaml").read_text())
    content["train"] |= {"epochs": 3, "patience": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "here").mkdir()
    write_tiny_cora(tmp_path / "here", tiny_graph(nodes=1600, edges=3000))
    variants = ["mlp", "gcn", "Mowst, gcn", "soft mixture of outputs, gcn"]
    command = ["tools/mowst_study.py", "--config", tmp_path / "config.yaml", "--graphs", "cora", "--seeds", 2]
    command += ["--draws", 2, "--splits", "random", "--rewired", 0.5, "--root", tmp_path / "here"]
    command += ["--variants", *variants]
    places = ["--runs", tmp_path / "runs", "--report", tmp_path / "report"]
    outcome = finish(start(sys.executable, *command, *places))
    assert outcome.code == 0, outcome.err
    table = (tmp_path / "report" / "table.md").read_text()
    assert "## cora, random\n" in table
    assert "## cora, random, 50% rewired\n" in table
    rows = cells_of(tmp_path / "report" / "table.md")
    assert set(variants) <= set(rows)
    assert re.fullmatch(r"\**[+-]\d+\.\d\d \[.*\]\**", rows["Mowst, gcn"][1])
    again = finish(start(sys.executable, *command, *places))
    assert again.out.count("trained already") == outcome.out.count(": trained\n")
    assert (tmp_path / "report" / "figure.png").stat().st_size > 10_000
