"""Reports: one HTML file of runs and of what their experts see."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.supervised.runs import find_weights, trained_model
from dist_moe.report import atlas_of_hugging_face, atlas_of_run, report_of_hugging_face, report_of_runs
from dist_moe.report.drawing import Line, heat_map, line_chart
from dist_moe.report.runs import POINTS, read_run
from tests.data.text.test_own_tokenizer import byte_level
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.texts import DOMAINS, write_lm_config

_EMPTY = {"meta", "br", "img", "path", "rect", "circle", "polyline", "image"}


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and takes in what is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self.open.pop() == tag


def write_run(root: Path, records: list[dict[str, object]], **files: object) -> Path:
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("seed: 0 # <b>\n")
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    """A trained language model: COMET, two MoE layers."""
    root = tmp_path_factory.mktemp("report")
    succeed(1, "train", write_lm_config(root, tiny_text), "--run-dir", root / "run")
    return root / "run"


def test_a_run_that_has_ended_has_a_page_that_needs_nothing_else(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert all(source.startswith("data:image/png;base64,") for source in Balanced(text).sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("https://", "http")
    test = json.loads((run / "summary.json").read_text())["test"]
    for domain in DOMAINS:
        assert f"<td>bits_per_byte_{domain}</td><td>{test[f'bits_per_byte_{domain}']:.4f}</td>" in text
    assert "<th>unigram</th>" in text
    assert "Load, layer by expert" in text
    assert "What each expert sees" not in text, "that takes the model"
    assert len(text) < 3e6


def test_what_experts_see_is_what_the_gates_chose(run: Path) -> None:
    atlas = atlas_of_run(run)
    task = find_weights(run).config.data.open(progress=False)
    model = trained_model(run, task, SingleWorld()).eval()
    assert atlas.kinds == DOMAINS
    assert atlas.examples == len(task.test)
    rows_N = np.arange(len(task.test))
    with torch.no_grad():
        output = model(*task.test.batch(rows_N, rows_N).inputs)
    for layer, (name, seen) in zip(output.layers, atlas.layers.items(), strict=True):
        count_CE = np.zeros_like(seen.count_CE)
        words: list[dict[str, int]] = [{} for _ in range(count_CE.shape[1])]
        (route,) = layer.routes
        tokens = task.test.batch(rows_N, rows_N).token_BS.flatten()
        for token, expert in zip(route.token_N.tolist(), route.slot_N.tolist(), strict=True):
            count_CE[task.test.domain_N[token // 16], expert] += 1
            word = task.tokenizer.decode([int(tokens[token])])
            words[expert][word] = words[expert].get(word, 0) + 1
        assert (seen.count_CE == count_CE).all(), name
        assert [dict(of) for of in seen.words_E] == words
        for expert, favourites in enumerate(seen.favourites()):
            assert all(words[expert][word] >= 5 for word in favourites)


def test_the_command_draws_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    output = tmp_path / "both.html"
    (outcome,) = succeed(1, "report", run, other, "--output", output)
    assert outcome.out == f"written to {output}\n"
    text = output.read_text()
    Balanced(text)
    names = [f"{path.parent.name}/run" for path in (run, other)]
    for name in names:
        assert f"About {name}" in text, "two runs of one name are told apart"
    assert "seed: 0 # &lt;b&gt;" in text
    assert f"What each expert sees: {names[0]}" in text
    assert re.search(rf"{names[1]}</h2>\n<p class=\"small\">[^<]*checkpoint", text), "why there is none"
    assert "Words of each expert" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name runs, or --hf DIR"),
        (("--hf", "somewhere"), "--hf needs --text"),
        (("somewhere", "--text", "a.txt"), "--text goes with --hf"),
        (("somewhere",), "somewhere is not a run directory"),
        (("somewhere", "--hf", "here"), "name runs, or --hf DIR"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], words: str) -> None:
    (outcome,) = dist_moe(1, "report", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


def test_a_run_named_twice(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        report_of_runs([run, run], tmp_path / "report.html", atlas=False)


def test_long_runs_are_thinned_to_means(tmp_path: Path) -> None:
    steps = 10 * POINTS
    load = [[[1.0, 3.0], [2.0, 0.0, 2.0]] for _ in range(steps)]
    records = [{"step": i + 1, "loss": float(i % 10), "load": load[i]} for i in range(steps)]
    records[4]["validation"] = {"loss": 1.5, "undefined": {"auc": "why"}}  # type: ignore[assignment]
    read = read_run(write_run(tmp_path / "run", records, result={"test": {"loss": 0.25}}))
    thinned = read.curves["loss"].thinned()
    assert (thinned.value_N == 4.5).all()
    assert thinned.step_N[:2].tolist() == [5.5, 15.5]
    assert read.load_NLE.shape == (POINTS, 2, 3)
    assert read.load_NLE[7, 0, :2].tolist() == [0.25, 0.75]
    assert np.isnan(read.load_NLE[7, 0, 2]), "a layer with fewer experts"
    assert read.validations["loss"].value_N.tolist() == [1.5]
    report_of_runs([tmp_path / "run"], tmp_path / "page.html", atlas=False)
    row = "<tr><td>1</td><td>3</td><td>2.0</td><td>1</td><td>1.50</td></tr>"
    assert row in (tmp_path / "page.html").read_text(), "layer, experts, effective, without a token, largest load"


def test_charts_hold_their_points() -> None:
    points = Line("a <b>", np.array([0.0, 10.0, 20.0]), np.array([0.0, np.nan, 4.0]))
    drawn = line_chart("t", "s", [points])
    ((first, last),) = [of.split() for of in re.findall(r'points="([^"]*)"', drawn)]
    assert first == "58.0,176.0", "the lower left corner"
    assert last == "448.0,24.0", "the upper right one"
    assert line_chart("t", "s", [Line("none", np.array([1.0]), np.array([np.inf]))]) == ""
    assert "a &lt;b&gt;" in line_chart("t", "s", [points, points])
    names = [str(i) for i in range(256)]
    large = heat_map("h", np.random.default_rng(0).random((60, 256)), names[:60], names, axes=("l", "e"), unit="u")
    assert len(large) < 30_000, "60 layers of 256 experts"


def test_a_run_has_its_colour_in_every_chart_and_its_name_where_it_is_alone(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [{"step": n, "loss": 1.0, "total_loss": 2.0} for n in (1, 2)])
    of_second = [{"step": n, "loss": 3.0, "total_loss": 3.0, "mine": 4.0, "validation": {"f1": 0.5}} for n in (1, 2)]
    second = write_run(tmp_path / "second", of_second)
    report_of_runs([first, second], tmp_path / "page.html", atlas=False)
    charts = {svg.split('"')[0]: svg for svg in (tmp_path / "page.html").read_text().split('aria-label="')[1:]}
    styles = {
        title: re.findall(r'polyline class="line" stroke="(.*?)" stroke-dasharray="(.*?)"', svg)
        for title, svg in charts.items()
    }
    (one, _), (also_one, dashed), (other, _) = styles["Loss"]
    assert (one == also_one, dashed) == (True, "6 3")
    assert len(styles["Loss"]) == 3, "the second total_loss is its loss"
    assert styles["mine"] == styles["Validation: f1"] == [(other, "")]
    assert other != one
    for title in ("mine", "Validation: f1"):
        assert ">second<" in charts[title], "which run it is"


def test_words_of_charts_have_room() -> None:
    step_N = np.array([0.0, 1.0])
    lines = [Line(f"a_run_of_mine: {name}_per_second", step_N, step_N * 3e4) for name in ("examples", "tokens")]
    drawn = line_chart("Speed", "per second", lines)
    places = [re.search(rf'x="([\d.]+)" y="([\d.]+)"[^>]*>{line.label}<', drawn) for line in lines]
    (first_x, first_y), (second_x, second_y) = (place.groups() for place in places if place)
    assert first_x == second_x
    assert float(second_y) > float(first_y) + 11, "long labels stand one below the other"
    assert re.findall(r"(?<=>)\d0,000(?=<)", drawn) == ["10,000", "20,000", "30,000"]
    short = [Line(name, step_N, step_N) for name in ("first", "second")]
    rows = [re.search(rf'y="([\d.]+)"[^>]*>{line.label}<', line_chart("t", "", short)) for line in short]
    assert len({row.group(1) for row in rows if row}) == 1, "short ones beside each other"


def test_only_what_has_many_parts_is_folded_away(tmp_path: Path) -> None:
    metrics = {"loss": 1.0, "loss_by_batches": 1.0} | dict.fromkeys(
        ["bits", *(f"bits_{part}" for part in "abcde")], 1.0
    )
    record: dict[str, object] = {"step": 1, "loss": 2.0, "validation": metrics}
    run = write_run(tmp_path / "run", [record])
    report_of_runs([run], tmp_path / "page.html", atlas=False)
    open_, folded = (tmp_path / "page.html").read_text().split("<summary>Validation, by parts of the data")
    assert "Validation: loss_by_batches" in open_
    assert "Validation: bits_a" not in open_
    assert "Validation: bits_a" in folded


def test_the_command_can_be_typed_again(tmp_path: Path) -> None:
    words = ["dist-moe", "train", "c.yaml", "model.experts={hidden: 64}"]
    run = write_run(tmp_path / "run", [], environment={"command": words})
    report_of_runs([run], tmp_path / "page.html", atlas=False)
    (typed,) = re.findall("<pre>(dist-moe.*?)</pre>", (tmp_path / "page.html").read_text())
    assert shlex.split(html.unescape(typed)) == words


def test_a_missing_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails then
    with pytest.raises(UserError, match="pip install transformers"):
        atlas_of_hugging_face(tmp_path, [])


def test_a_transformers_mixture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_level()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8}
    config = transformers.MixtralConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, **experts)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "mixtral")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(tmp_path / "mixtral")
    texts = [tmp_path / "soup.txt", tmp_path / "sails.txt"]
    for path, words in zip(texts, ("stir the soup " * 9, "haul the sheet " * 7), strict=True):
        path.write_text(words)
    atlas = atlas_of_hugging_face(tmp_path / "mixtral", texts, length=16)
    assert atlas.kinds == ("soup.txt", "sails.txt")
    counts = [len(fast(path.read_text())["input_ids"]) for path in texts]
    for layer, seen in enumerate(atlas.layers.values()):
        assert seen.count_CE.sum(axis=1).tolist() == [2 * count for count in counts]
        head_T = torch.tensor(fast(texts[0].read_text())["input_ids"][:16])
        expected_E = np.zeros(4)
        logits_TE = model.eval()(head_T[None], output_router_logits=True).router_logits[layer]
        for expert in logits_TE.topk(2).indices.flatten().tolist():
            expected_E[expert] += 1
        one = atlas_of_hugging_face(tmp_path / "mixtral", [_head(tmp_path, fast, head_T)], length=16)
        assert (list(one.layers.values())[layer].count_CE[0] == expected_E).all()
    report_of_hugging_face(tmp_path / "mixtral", texts, tmp_path / "page.html")
    Balanced((tmp_path / "page.html").read_text())


def _head(directory: Path, tokenizer: object, token_T: torch.Tensor) -> Path:
    path = directory / "head.txt"
    path.write_text(tokenizer.decode(token_T.tolist()))  # type: ignore[attr-defined]
    return path


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, a Debian package")
@pytest.mark.parametrize("width", [1280, 500])  # a window of Chromium's is no narrower; the page is put in one of 400
def test_in_a_browser_nothing_is_wider_than_the_page(run: Path, tmp_path: Path, width: int) -> None:
    inner = min(width, 400) if width < 1000 else width - 40
    (tmp_path / "page.html").write_text((run / "report.html").read_text())
    script = "onload = () => { const w = document.querySelector('iframe').contentDocument.documentElement.scrollWidth;"
    script += " document.body.dataset.wide = w }"
    frame = f'<iframe src="page.html" style="width: {inner}px; height: 900px; border: 0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<body>{frame}<script>{script}</script></body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = ["chromium", *options, f"--window-size={width},900", f"file://{tmp_path}/frame.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    (seen,) = re.findall(r'data-wide="(\d+)"', dom)
    assert int(seen) <= inner
