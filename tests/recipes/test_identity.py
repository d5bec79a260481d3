"""A run knows its data: of every kind of data, changed in many ways, none is met again without a word."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.recipes.hugging_face.export import export_hugging_face
from dist_moe.recipes.recipe import load_config, plan_new_run, plan_restartable_run, plan_resumed_run
from dist_moe.recipes.supervised import evaluate as evaluation
from dist_moe.recipes.supervised.evaluate import evaluate_run
from dist_moe.recipes.supervised.search import search_run
from dist_moe.search import SwapSearchConfig
from tests.data.labelled_text.tiny_texts import SAMPLES, write_messages
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.commands import succeed
from tests.helpers.runs import TINY_RUN, summary_of, write_yaml
from tests.helpers.text_runs import write_encoder, write_text_config
from tests.helpers.texts import TINY_LM, write_tiny_text

STEPS = {"max_steps": 2, "epochs": 9, "batch_size": 16, "log_every": 1}
PARTS = {"train", "val", "test"}


@dataclass(frozen=True)
class Kind:
    """A kind of data. ``write``: its files below a directory. ``config``: a run on it. ``changes``: by name, what
    somebody does to the files, and the digests of which at least these change. ``same``: what changes none."""

    write: Callable[[Path], Path]
    config: Callable[[Path, Path], Path]
    changes: dict[str, tuple[Callable[[Path], None], set[str]]]
    same: Callable[[Path], None] = lambda root: None


def replaced(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Another file of the same size."""
    assert len(old) == len(new)

    def change(root: Path) -> None:
        path = root / file
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return change


def appended(file: str, lines: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        content = (root / file).read_bytes().splitlines(keepends=True)
        (root / file).write_bytes(b"".join(lines(content)))

    return change


def a_document_more(root: Path) -> None:
    for domain in root.iterdir():
        shutil.copy(domain / "0.txt", domain / "new.txt")
        with (domain / "new.txt").open("a") as file:
            file.write("and one more\n")


def exchanged(one: str, other: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        kept = (root / one).read_bytes()
        (root / one).write_bytes((root / other).read_bytes())
        (root / other).write_bytes(kept)

    return change


def another_pixel(root: Path) -> None:
    path = root / "t10k-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-300] ^= 255
    path.write_bytes(gzip.compress(bytes(content)))


def another_label(root: Path) -> None:
    path = root / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    path.write_bytes(gzip.compress(bytes(content)))


def images_reordered(root: Path) -> None:
    for stem, size, head in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
        path = root / f"train-{stem}-ubyte.gz"
        content = gzip.decompress(path.read_bytes())
        rows = [content[i : i + size] for i in range(head, len(content), size)]
        path.write_bytes(gzip.compress(content[:head] + b"".join(reversed(rows))))


def tokens_exchanged(root: Path) -> None:
    """A tokenizer.json of equal size in which two tokens have changed places."""
    path = root.parent / "encoder" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def a_wider_encoder(root: Path) -> None:
    shutil.rmtree(root.parent / "encoder")
    write_encoder(root.parent / "encoder", width=24)


def write_squad(root: Path) -> Path:
    return Path(shutil.copytree(SAMPLES / "SQuAD", root))


def write_stars(root: Path) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    rows = zip(random.integers(10, 20, 200), random.integers(10, 30, 200), random.integers(1, 6, 200), strict=True)
    (root / "stars.csv").write_text("".join(f"{user},{item},{stars}\n" for user, item, stars in rows))
    return root


def tables(data: dict[str, str], file: str = "") -> Callable[[Path, Path], Path]:
    def config(directory: Path, root: Path) -> Path:
        places = {"root": str(root / file)} | ({} if file else {"cache": str(directory / "cache")})
        imports = {"imports": ["tests.recipes.outside.stars"]} if file else {}
        return write_yaml(directory, TINY_RUN | {"data": data | places, "train": STEPS} | imports, {})

    return config


def images(directory: Path, root: Path) -> Path:
    data = {"name": "multi-mnist", "root": str(root), "cache": str(directory / "cache")}
    model = {"num_experts": 2, "experts": {"channels": [2, 3], "units": [6, 5]}, "head_units": [7]}
    return write_yaml(directory, {"data": data, "model": model, "train": STEPS | {"batch_size": 8}}, {})


def language(directory: Path, root: Path) -> Path:
    data = TINY_LM["data"] | {"root": str(root), "cache": str(directory / "cache")}
    return write_yaml(directory, TINY_LM | {"data": data, "train": STEPS | {"batch_size": 8}}, {})


def labelled(data: dict[str, Any], model: str) -> Callable[[Path, Path], Path]:
    def config(directory: Path, root: Path) -> Path:
        encoder = write_encoder(directory / "encoder")
        given = data | {"root": str(root)}
        return write_text_config(directory, encoder, given, model={"name": model}, train=STEPS)

    return config


ENCODERS = {
    "another tokenizer of the same size": (tokens_exchanged, {"tokenizer", "train", "test"}),
    "a wider encoder": (a_wider_encoder, {"encoder"}),
}
KINDS = {
    "movielens": Kind(
        lambda root: write_tiny_movielens(root, users=40, items=30),
        tables({"name": "movielens-1m"}),
        {
            "ratings appended": (appended("ratings.dat", lambda lines: [*lines, b"500::1::5::9\n"]), PARTS),
            "another rating": (appended("ratings.dat", lambda lines: [_starred(lines[0]), *lines[1:]]), set()),
        },
        same=appended("ratings.dat", lambda lines: lines[::-1]),
    ),
    "text": Kind(
        write_tiny_text,
        language,
        {
            "a document more in each domain": (a_document_more, {"train", "tokenizer"}),
            "a letter": (replaced("cooking/3.txt", b"soup", b"sauc"), set()),
            "documents in another order": (exchanged("sailing/1.txt", "sailing/8.txt"), set()),
        },
    ),
    "two images": Kind(
        lambda root: write_tiny_images(root, train=42, test=9),
        images,
        {
            "a pixel": (another_pixel, {"test"}),
            "a label": (another_label, set()),
            "images in another order": (images_reordered, {"train", "val"}),
        },
    ),
    "labelled text": Kind(
        write_messages,
        labelled({"name": "sms-spam"}, "bert_classifier"),
        {
            "a message more": (
                appended("sms-spam.csv", lambda lines: [*lines, b"x,1,quite new\r\n"]),
                {"split"},
            ),
            "a label": (replaced("sms-spam.csv", b"sms3,0,", b"sms3,1,"), {"split"}),
            "messages in another order": (
                appended("sms-spam.csv", lambda lines: [lines[0], *lines[:0:-1]]),
                {"train", "split"},
            ),
            **ENCODERS,
        },
    ),
    "questions": Kind(
        write_squad,
        labelled({"name": "squad-v2", "max_length": 64, "stride": 8}, "bert_answerer"),
        {"a letter": (replaced("dev-v2.0.json", b"What", b"Whot"), {"test", "split"}), **ENCODERS},
    ),
    "in memory": Kind(
        write_stars,
        tables({"name": "stars"}, "stars.csv"),
        {
            "a row more": (appended("stars.csv", lambda lines: [*lines, b"12,12,1\n"]), PARTS),
            "other stars": (appended("stars.csv", lambda lines: [*lines[:-1], _starred(lines[-1], b",")]), {"test"}),
            "rows in another order": (appended("stars.csv", lambda lines: lines[::-1]), {"train", "test"}),
            "an item more": (appended("stars.csv", lambda lines: [*lines[:-1], b"12,31,1\n"]), {"test", "sizes"}),
        },
    ),
}


def _starred(line: bytes, between: bytes = b"::") -> bytes:
    """A line with other stars."""
    parts = line.strip().split(between)
    parts[2] = b"2" if parts[2] != b"2" else b"3"
    return between.join(parts) + b"\n"


@dataclass(frozen=True)
class Trained:
    """A run of a kind. ``places``: the directories that somebody may change."""

    kind: Kind
    root: Path
    run: Path

    @property
    def places(self) -> list[Path]:
        return [path for path in (self.root, self.root.parent / "encoder") if path.exists()]


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory: Path = tmp_path_factory.mktemp("kind")
    kind = KINDS[request.param]
    root = kind.write(directory / "raw")
    config = kind.config(directory, root)
    succeed(1, "train", config, "--run-dir", directory / "run")
    return Trained(kind, root, directory / "run")


@contextmanager
def changed(trained: Trained, name: str, aside: Path) -> Iterator[set[str]]:
    """The data are changed inside, and put back afterwards; gives the names that must be told."""
    for place in trained.places:
        shutil.copytree(place, aside / place.name)
    act, names = trained.kind.changes[name]
    act(trained.root)
    try:
        yield names
    finally:
        for place in trained.places:
            shutil.rmtree(place)
            shutil.move(aside / place.name, place)


IN_WORDS = {
    **{part: f"the prepared data of part {part}" for part in PARTS},
    "tokenizer": "the tokenizer",
    "encoder": "the encoder",
    "split": "the texts and their split",
    "sizes": "the vocabulary or sizes",
}


def test_changed_data_are_refused_by_all_who_meet_them(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "process_groups", lambda *_: pytest.fail("process groups were opened"))
    before = {path: path.read_bytes() for path in trained.run.iterdir() if path.is_file()}
    meetings: dict[str, Callable[[], Any]] = {
        "resume": lambda: plan_resumed_run(trained.run, []),
        "restart": lambda: plan_restartable_run(trained.run / "config.yaml", [], trained.run),
        "evaluate": lambda: evaluate_run(trained.run),
        "evaluate a checkpoint": lambda: evaluate_run(trained.run / "checkpoints" / "step-00000002"),
        "search": lambda: search_run(trained.run, tmp_path / "written", SwapSearchConfig()),
    }
    if load_config(trained.run / "config.yaml").model.name in ("transformer", "bert_classifier", "bert_answerer"):
        meetings["export"] = lambda: export_hugging_face(trained.run, tmp_path / "written", torch.float32)
    for name in trained.kind.changes:
        with changed(trained, name, tmp_path / "aside") as told:
            for meeting in meetings.values():
                with pytest.raises(UserError, match=r" changed since it was trained; .*--allow-changed-data") as caught:
                    meeting()
                assert [IN_WORDS[one] for one in told if IN_WORDS[one] not in str(caught.value)] == [], name
    assert {path: path.read_bytes() for path in trained.run.iterdir() if path.is_file()} == before
    assert not (tmp_path / "written").exists()
    assert warnings_of(trained.run) == []  # and with the data put back it goes on


@pytest.mark.parametrize("trained", ["text"], indirect=True)
def test_no_decoder_starts_from_a_run_whose_vocabulary_is_gone(trained: Trained, tmp_path: Path) -> None:
    """A vocabulary is learnt from the text: of the text as it is now it is that of the new run, not of the old one."""
    config, start = trained.run / "config.yaml", f"start={{name: decoder, run: {trained.run}}}"
    assert plan_new_run(config, [start], tmp_path / "new").identity.weights.keys() == {"start"}
    with (
        changed(trained, "a document more in each domain", tmp_path / "aside"),
        pytest.raises(UserError, match=r"start\.run=.*with other data than this run has; what differs: the tokenizer"),
    ):
        plan_new_run(config, [start], tmp_path / "new")


def warnings_of(run: Path, *overrides: str) -> list[str]:
    """With which a run would go on."""
    plan = plan_resumed_run(run, list(overrides))
    assert plan.checkpoint is not None
    return [one for one in plan.start.warnings if not one.startswith("warning: validation examples: every question")]


def test_the_same_data_elsewhere_and_prepared_again_are_the_same(trained: Trained, tmp_path: Path) -> None:
    moved = shutil.copytree(trained.root, tmp_path / "moved")
    trained.kind.same(moved)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    root = moved / "stars.csv" if (moved / "stars.csv").exists() else moved
    overrides = [f"data.root={root}"]
    if "cache" in (trained.run / "config.yaml").read_text():
        overrides.append(f"data.cache={tmp_path / 'cache'}")
    if (encoder := trained.root.parent / "encoder").exists():
        overrides.append(f"data.encoder={shutil.copytree(encoder, tmp_path / 'encoder')}")
    assert warnings_of(trained.run, *overrides) == []
    assert summary_of(trained.run)["data_changes"] == []


def test_other_code_of_preparation_is_other_data(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_moe.data.labelled_text import prepared_questions, prepared_texts
    from dist_moe.data.movielens import prepare as movielens
    from dist_moe.data.text import prepare as text
    from dist_moe.data.two_images import prepare as two_images

    if (trained.root / "stars.csv").exists():
        pytest.skip("nothing is prepared")
    for module in (movielens, text, two_images, prepared_texts, prepared_questions):
        monkeypatch.setattr(module, "FORMAT_VERSION", 99)
    with pytest.raises(UserError, match="the code that prepares the data changed"):
        plan_resumed_run(trained.run, [])
