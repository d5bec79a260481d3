"""Text cut by a tokenizer of the user's own: the same text, exact bytes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.data.text.tokenizer import open_own_tokenizer
from dist_moe.errors import UserError
from tests.data.checks import PARTS

from .conftest import SMALL
from .test_prepare import documents_of, whole
from .tiny_text import tiny_documents


def byte_level(separator: str = "<|endoftext|>") -> Tokenizer:
    """Cuts and fills up by itself, as tokenizers of published models may."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", separator]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the captain of the ship and the whale"] * 9, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Mixtral have it: a space before the first word, bytes for what it has no letters for."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "th", "the", "▁the"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("t", "h"), ("th", "e"), ("▁", "the")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


KINDS = {"byte_level": (byte_level, "<|endoftext|>"), "sentence_piece": (sentence_piece, "</s>")}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, (make, _) in KINDS.items():
        (root / name).mkdir()
        make().save(str(root / name / "tokenizer.json"))
    return {name: root / name for name in KINDS}


def prepare(root: Path, cache: Path, **options: object) -> Text:
    return prepare_text(TextConfig(root=root, cache=cache, **(SMALL | options)), progress=False)


@pytest.mark.parametrize("name", KINDS)
def test_every_byte_is_counted_once(root: Path, directories: dict[str, Path], tmp_path: Path, name: str) -> None:
    """With the few tokens at the end of each stream, which no sequence has, the bytes are those of the documents."""
    text = prepare(root, tmp_path, tokenizer=directories[name])
    assert text.tokenizer.id_to_token(text.end_of_text) == KINDS[name][1]
    for part in PARTS:
        table = getattr(text, part)
        assert table.byte_M is not None
        written = sum(entry["bytes"][part] for entry in text.manifest["domains"].values())
        assert int(table.byte_M.sum(dtype=np.int64)) == written
        _, _, bytes_N = whole(table)
        ends = table.start_N + table.sequence_length
        expected = [table.byte_M[start + 1 : end + 1].sum() for start, end in zip(table.start_N, ends, strict=True)]
        assert bytes_N.tolist() == expected
        assert (table.byte_M[table.token_M == text.end_of_text] == 0).all()
    original = tiny_documents()
    for index, domain in enumerate(text.domains):
        *complete, _ = documents_of(text, "train", index)
        assert complete
        assert all(document in original[domain] for document in complete)


def test_bytes_of_a_byte_level_tokenizer_are_those_of_its_tokens(root: Path, tmp_path: Path) -> None:
    """The tokenizer that is learned, given as one's own: the same tokens; the same bytes, but within a character."""
    learned = prepare(root, tmp_path)
    learned.tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = prepare(root, tmp_path, tokenizer=tmp_path / "tokenizer.json")
    for part in PARTS:
        one, other = getattr(learned, part), getattr(given, part)
        assert np.array_equal(one.token_M, other.token_M)
        difference_N = whole(one)[2] - whole(other)[2]
        assert np.abs(difference_N).max() <= 3
        assert (difference_N == 0).mean() > 0.8


def test_the_cache_knows_which_tokenizer(root: Path, directories: dict[str, Path], tmp_path: Path) -> None:
    def kept() -> int:
        return len([path for path in (tmp_path / "text").iterdir() if path.is_dir()])

    path = tmp_path / "mine.json"
    path.write_bytes((directories["byte_level"] / "tokenizer.json").read_bytes())
    prepare(root, tmp_path, tokenizer=path)
    prepare(root, tmp_path, tokenizer=path, vocab_size=400)
    assert kept() == 1
    prepare(root, tmp_path, tokenizer=path, end_of_text="<pad>")
    assert kept() == 2
    byte_level("<|the_end|>").save(str(path))
    assert prepare(root, tmp_path, tokenizer=path, end_of_text="<|the_end|>").tokenizer.token_to_id("<|the_end|>") == 1
    assert kept() == 3


def test_the_end_of_text_is_what_stands_beside_it(directories: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((directories["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, "vocab_size": 70_000}))
    assert open_own_tokenizer(tmp_path, None).end_of_text == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    own = open_own_tokenizer(file, None)
    assert (own.end_of_text, own.vocab_size) == (1, 70_000)
    assert own.encode("sea", ["the ship"])[0].dtype == np.uint32
    assert open_own_tokenizer(file, "<pad>").end_of_text == 0


def refusal(directory: Path, end_of_text: str | None = None, document: str = "") -> str:
    with pytest.raises(UserError) as refused:
        open_own_tokenizer(directory, end_of_text).encode("sea", [document])
    return str(refused.value)


def test_a_token_of_more_bytes_than_are_counted(tmp_path: Path) -> None:
    for letters, allowed in ((65_535, True), (65_536, False)):
        word = "a" * letters
        Tokenizer(models.WordLevel({"</s>": 0, word: 1}, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
        if allowed:
            _, byte_M = open_own_tokenizer(tmp_path, None).encode("sea", [word])
            assert byte_M.tolist() == [0, letters, 0]
        else:
            assert "in a document of the domain sea one token stands for 65,536 bytes" in refusal(tmp_path, None, word)


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    assert "cannot be read" in refusal(tmp_path)
    byte_level("<|the_end|>").save(str(file))
    message = refusal(tmp_path)
    assert f"data.tokenizer={tmp_path} has no end-of-text token" in message
    assert "by data.end_of_text" in message
    assert "has no token 'nothing', the end of text by data.end_of_text" in refusal(tmp_path, "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert "several end-of-text tokens, <pad>, <|the_end|>" in refusal(tmp_path)
    assert "spells out 'a'" in refusal(tmp_path, "a", "a whale")
    for ids in ("2", -1, {"a": 1}, [0, True]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert f"config.json has eos_token_id={ids!r}, which is no token's id" in refusal(tmp_path)
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    lower.save(str(file))
    message = refusal(tmp_path, "<pad>", "the White Whale")
    assert "in the domain sea it makes 'the white whale' of 'the White Whale'" in message
