"""Tokens and batches: what a row holds, how it is filled up, and the size of the whole step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import LabelledTable
from dist_moe.data.labelled_text.texts import TextOrPair
from dist_moe.data.labelled_text.tokens import TokenisedTexts, open_tokenizer, padding_of, tokenised
from dist_moe.errors import UserError

from .tiny_texts import sentences, tiny_tokenizer

SILENT = Progress(enabled=False)
PADDING = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def read_back(tokens: TokenisedTexts, row: int) -> list[int]:
    return [int(x) for x in tokens.token_M[tokens.start_P[row] : tokens.start_P[row + 1]]]


def table(tokenizer: Tokenizer, texts: list[TextOrPair], max_length: int = 32) -> LabelledTable:
    found = tokenised(open_tokenizer(tokenizer, max_length), texts, "train", SILENT)
    target_N = np.arange(len(texts), dtype=np.int64) % 3
    return LabelledTable(found.token_M, found.start_P, found.first_N, target_N, PADDING, len(texts[0]) == 2)


def test_each_text_by_itself_and_cut_where_it_is_long(tokenizer: Tokenizer) -> None:
    texts: list[TextOrPair] = [(text,) for text in sentences(2500)]  # several blocks
    found = tokenised(open_tokenizer(tokenizer, 20), texts, "train", SILENT)
    for row in (0, 1, 1023, 1024, 2499):
        alone = tokenizer.encode(texts[row][0]).ids
        expected = alone if len(alone) <= 20 else [*alone[:19], tokenizer.token_to_id("[SEP]")]
        assert read_back(found, row) == expected
    lengths = [len(tokenizer.encode(text).ids) for (text,) in texts]
    assert found.cut == sum(length > 20 for length in lengths) > 0
    assert np.diff(found.start_P).tolist() == [min(length, 20) for length in lengths]
    np.testing.assert_array_equal(found.first_N, np.diff(found.start_P))


def test_of_a_pair_the_longer_text_is_cut(tokenizer: Tokenizer) -> None:
    found = tokenised(open_tokenizer(tokenizer, 10), [("ab", "abcdefghijkl")], "train", SILENT)
    assert (
        tokenizer.decode(read_back(found, 0), skip_special_tokens=False).replace(" ##", "")
        == "[CLS] ab [SEP] abcde [SEP]"
    )
    assert (found.first_N.tolist(), found.cut) == ([4], 1)


def test_what_the_tokenizer_was_set_to_makes_no_difference(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=50)
    other.enable_truncation(5)
    one, two = (tokenised(open_tokenizer(t, 16), [("amber boat",)], "train", SILENT) for t in (tokenizer, other))
    assert read_back(one, 0) == read_back(two, 0) == tokenizer.encode("amber boat").ids
    assert other.padding is not None


def test_a_file_of_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path / "tokenizer.json", 16).to_str() == open_tokenizer(tokenizer, 16).to_str()
    assert padding_of(tokenizer) == 0
    (tmp_path / "torn.json").write_text("{")
    for name in ("torn.json", "absent.json"):
        with pytest.raises(UserError, match=rf"data\.tokenizer=.*{name} cannot be read"):
            open_tokenizer(tmp_path / name, 16)


def test_a_text_without_tokens_is_refused(tokenizer: Tokenizer) -> None:
    assert tokenised(open_tokenizer(tokenizer, 16), [("",)], "train", SILENT).start_P.tolist() == [0, 2]
    from tokenizers.processors import Sequence

    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = Sequence([])
    with pytest.raises(UserError, match="gives no tokens"):
        tokenised(open_tokenizer(bare, 16), [("",)], "train", SILENT)


def test_rows_are_filled_up_to_the_longest_of_their_batch(tokenizer: Tokenizer) -> None:
    texts: list[TextOrPair] = [(text,) for text in sentences(30)]
    examples = table(tokenizer, texts, max_length=64)
    index = np.array([7, 0, 3])
    step = np.array([7, 0, 3, 9, 11])
    batch = examples.batch(index, step)
    rows = [tokenizer.encode(texts[i][0]).ids for i in index]
    longest = max(map(len, rows))
    assert batch.token_BS.tolist() == [row + [PADDING] * (longest - len(row)) for row in rows]
    assert batch.length_B.tolist() == [len(row) for row in rows]
    assert batch.label_B.tolist() == [1, 0, 0]
    assert {x.dtype for x in (batch.token_BS, batch.length_B, batch.label_B)} == {torch.int64}
    assert (len(batch), batch.examples_in_step, batch.type_BS) == (3, 5, None)
    assert batch.tokens_in_step == sum(len(tokenizer.encode(texts[i][0]).ids) for i in step)
    assert [x.data_ptr() for x in batch.inputs] == [batch.token_BS.data_ptr(), batch.length_B.data_ptr()]


def test_pairs_say_which_text_a_token_is_of(tokenizer: Tokenizer) -> None:
    texts: list[TextOrPair] = [("ab", "c"), ("d", "efgh"), ("a", "b")]
    batch = table(tokenizer, texts).batch(np.arange(3), np.arange(3))
    assert batch.type_BS is not None
    longest = batch.token_BS.shape[1]
    for row, (first, second) in enumerate(texts):
        types = tokenizer.encode(first, second).type_ids
        assert batch.type_BS[row].tolist() == types + [0] * (longest - len(types))
    assert batch.inputs[2] is batch.type_BS
    moved = batch.to(torch.device("cpu"))
    assert moved.type_BS is not None
    assert torch.equal(moved.type_BS, batch.type_BS)
    assert (moved.tokens_in_step, moved.examples_in_step) == (batch.tokens_in_step, 3)


def test_no_rows_give_an_empty_batch(tokenizer: Tokenizer) -> None:
    batch = table(tokenizer, [("a", "b")]).batch(np.arange(0), np.arange(0))
    assert (batch.token_BS.shape, batch.length_B.shape, batch.label_B.shape) == ((0, 1), (0,), (0,))
    assert (len(batch), batch.examples_in_step, batch.tokens_in_step) == (0, 0, 0)
