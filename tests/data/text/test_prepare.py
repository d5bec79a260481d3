"""Prepared text: every token of every document once, exact bytes, no document in two parts, the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.data.prepared import MANIFEST
from dist_moe.data.text import Text, TextConfig, TokenTable, prepare, prepare_text
from dist_moe.errors import UserError
from tests.data.checks import PARTS

from .conftest import SMALL
from .tiny_text import tiny_documents, write_text


def whole(table: TokenTable) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and targets (N, S) and bytes (N) of all sequences."""
    index = np.arange(len(table))
    batch = table.batch(index, index)
    return batch.token_BS.numpy(), batch.target_BS.numpy(), batch.bytes_B.numpy()


def documents_of(text: Text, part: str, domain: int) -> list[str]:
    """The documents that a domain's stream decodes to, the last one as far as the sequences go."""
    table = getattr(text, part)
    (mine,) = np.nonzero(table.domain_N == domain)
    _, target_NS, _ = whole(table)
    tokens = target_NS[mine].ravel().tolist()
    ends = [i for i, token in enumerate(tokens) if token == text.end_of_text] + [len(tokens)]
    begins = [0, *(end + 1 for end in ends[:-1])]
    return [text.tokenizer.decode(tokens[b:e]) for b, e in zip(begins, ends, strict=True)]


def test_every_document_comes_back_from_one_part(text: Text) -> None:
    """All but the end of each stream, which is cut off within its last documents."""
    original = tiny_documents()
    assert text.domains == tuple(sorted(original))
    for index, domain in enumerate(text.domains):
        seen: list[str] = []
        for part in PARTS:
            *complete, last = documents_of(text, part, index)
            stripped = last.rstrip("\ufffd")  # a character of several tokens may be cut
            assert all(piece in original[domain] for piece in complete)
            assert any(document.startswith(stripped) for document in original[domain])
            seen += complete
        assert len(seen) == len(set(seen))
        assert len(seen) >= len(original[domain]) - 2 * len(PARTS)


def test_every_token_is_predicted_exactly_once(text: Text) -> None:
    for part in PARTS:
        table = getattr(text, part)
        token_NS, target_NS, _ = whole(table)
        np.testing.assert_array_equal(token_NS[:, 1:], target_NS[:, :-1])
        begin = 0
        for index, entry in enumerate(text.manifest["domains"].values()):
            length = entry["tokens"][part]
            stream = np.asarray(table.token_M[begin : begin + length])
            predicted = target_NS[table.domain_N == index].ravel()
            np.testing.assert_array_equal(predicted, stream[1 : 1 + len(predicted)])
            assert 0 <= length - 1 - len(predicted) < SMALL["sequence_length"]
            assert stream[0] == stream[-1] == text.end_of_text
            assert (stream == text.end_of_text).sum() == entry["documents"][part] + 1
            begin += length
        assert begin == len(table.token_M)


@pytest.mark.parametrize("length", [1, 7])
def test_bytes_are_those_of_the_documents(root: Path, text: Text, tmp_path: Path, length: int) -> None:
    """With sequences of one token nothing is cut off: the bytes of the targets are those of all documents."""
    config = TextConfig(root=root, cache=tmp_path, **SMALL | {"sequence_length": length})
    cut = prepare_text(config, progress=False)
    total = 0
    for part in PARTS:
        table = getattr(cut, part)
        _, target_NS, bytes_N = whole(table)
        for target_S, count in zip(target_NS, bytes_N, strict=True):
            # The bytes themselves, as a cut character would not decode.
            alphabet = [cut.tokenizer.id_to_token(token) for token in target_S if token != cut.end_of_text]
            assert count == sum(map(len, alphabet))
        for index, (name, entry) in enumerate(cut.manifest["domains"].items()):
            mine = int(bytes_N[table.domain_N == index].sum())
            total += mine
            if length == 1:
                assert mine == entry["bytes"][part]
            else:
                assert 0 <= entry["bytes"][part] - mine <= (length - 1) * int(cut.token_bytes_V.max()), name
    if length == 1:
        assert total == sum(len(document.encode()) for texts in tiny_documents().values() for document in texts)


def test_separator_is_no_text_and_no_text_is_a_separator(text: Text) -> None:
    assert text.token_bytes_V[text.end_of_text] == 0
    assert (np.delete(text.token_bytes_V, text.end_of_text) > 0).all()
    spelled = text.tokenizer.encode("<|endoftext|>").ids
    assert text.end_of_text not in spelled
    assert text.tokenizer.decode(spelled) == "<|endoftext|>"


def test_counts_are_of_the_training_part(text: Text) -> None:
    np.testing.assert_array_equal(
        text.token_counts_V, np.bincount(text.train.token_M, minlength=text.vocab_size).astype(np.int64)
    )
    assert text.token_counts_V.dtype == np.int64
    assert len(text.token_counts_V) == len(text.token_bytes_V) == text.vocab_size == text.tokenizer.get_vocab_size()


def test_vocabulary_is_learned_from_the_training_documents_alone(root: Path, tmp_path: Path, text: Text) -> None:
    """Other words in the documents that are held out change no token."""
    changed = documents_of(text, "val", 0)[0]
    documents = tiny_documents()
    place = documents["letters"].index(changed)
    documents["letters"][place] = "zebra quagga " * 400
    config = TextConfig(root=write_text(tmp_path / "root", documents), cache=tmp_path, **SMALL)
    other = prepare_text(config, progress=False)
    assert other.tokenizer.to_str() == text.tokenizer.to_str()
    assert "zebra" in other.tokenizer.decode(np.asarray(other.val.token_M).tolist())
    np.testing.assert_array_equal(other.train.token_M, text.train.token_M)


def test_the_same_in_another_process_with_other_threads(root: Path, text: Text, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dist_moe.data.text import *; "
        f"prepare_text(TextConfig(root=Path(sys.argv[1]), cache=Path(sys.argv[2]), **{SMALL!r}), progress=False)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", program, root, tmp_path], check=True, env=environment)
    (directory,) = (path.parent for path in (tmp_path / "text").glob(f"*/{MANIFEST}"))
    for part in PARTS:
        np.testing.assert_array_equal(np.load(directory / f"{part}_tokens.npy"), getattr(text, part).token_M)
    assert np.load(directory / "tokenizer.npy").tobytes().decode() == text.tokenizer.to_str()


def test_another_seed_splits_otherwise(root: Path, text: Text, tmp_path: Path) -> None:
    other = prepare_text(TextConfig(root=root, cache=tmp_path, seed=1, **SMALL), progress=False)
    assert set(documents_of(other, "val", 0)) != set(documents_of(text, "val", 0))


def test_prepared_once_for_each_setting_that_the_tokens_depend_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(**change: Any) -> bytes:
        config = TextConfig(root=root, cache=tmp_path, **SMALL | change)
        return prepare_text(config, progress=False).train.token_M.tobytes()

    changes = ({}, {"seed": 1}, {"held_out": 0.3}, {"vocab_size": 300}, {"characters_per_domain": 4000})
    first = [tokens(**change) for change in changes]
    assert len(set(first)) == len(changes)
    monkeypatch.setattr(prepare, "_build", lambda *_: pytest.fail("prepared again"))
    assert [tokens(**change) for change in changes] == first


def test_length_of_sequences_needs_no_new_preparation(root: Path, tmp_path: Path) -> None:
    for length in (8, 32):
        prepared = prepare_text(
            TextConfig(root=root, cache=tmp_path, **SMALL | {"sequence_length": length}), progress=False
        )
        assert prepared.train.batch(np.arange(3), np.arange(3)).token_BS.shape == (3, length)
    assert len(list((tmp_path / "text").glob(f"*/{MANIFEST}"))) == 1


def test_tokens_are_memory_mapped_and_read_only(text: Text) -> None:
    for part in PARTS:
        token_M = getattr(text, part).token_M
        assert isinstance(token_M, np.memmap)
        assert token_M.dtype == np.uint16
        assert not token_M.flags.writeable


def test_empty_batches_have_their_shapes(text: Text) -> None:
    nothing = np.arange(0)
    batch = text.val.batch(nothing, np.arange(4)).to(torch.device("cpu"))
    assert (len(batch), batch.tokens_in_step) == (0, 4 * SMALL["sequence_length"])
    assert batch.token_BS.shape == batch.target_BS.shape == (0, SMALL["sequence_length"])
    assert {x.dtype for x in (batch.token_BS, batch.target_BS, batch.bytes_B, batch.domain_B)} == {torch.int64}


def test_a_part_shorter_than_a_sequence_is_refused(root: Path, tmp_path: Path) -> None:
    config = TextConfig(root=root, cache=tmp_path, **SMALL | {"sequence_length": 100_000})
    with pytest.raises(UserError, match=r"data\.sequence_length=100000: the train part of the domain \w+ has only"):
        prepare_text(config, progress=False)
