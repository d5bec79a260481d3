"""`prepare_questions`: SQuAD v2's questions as windows, each token and answer traced back to its text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import AnswerTable, Questions, QuestionsConfig, prepare_questions, prepared_questions
from dist_moe.data.labelled_text.answers import NO_ANSWER, window_starts, windows_of
from dist_moe.data.labelled_text.squad import DEV_FILE, TRAIN_FILE, Answer, Question
from dist_moe.errors import UserError
from tests.data.checks import assert_same_arrays

from .tiny_texts import SAMPLES, read_squad, tiny_tokenizer

LENGTH, STRIDE = 60, 14
SILENT = Progress(False)


def config_of(tmp_path: Path, **fields: Any) -> QuestionsConfig:
    given = {"root": SAMPLES / "SQuAD", "cache": tmp_path / "cache", "max_length": LENGTH, "stride": STRIDE}
    return QuestionsConfig.model_validate(given | fields)


def prepare(tmp_path: Path, **fields: Any) -> Questions:
    return prepare_questions(config_of(tmp_path, **fields), tiny_tokenizer(), progress=False)


def ids_of(text: str) -> list[int]:
    return list(tiny_tokenizer().encode(text, add_special_tokens=False).ids)


def rows_of(table: AnswerTable) -> list[list[int]]:
    return [table.token_M[a:b].tolist() for a, b in zip(table.start_P, table.start_P[1:], strict=False)]


def letters(text: str) -> str:
    """All that the tiny tokenizer keeps of a text."""
    return "".join(text.lower().replace("\u00e9", "e").split())


def test_windows_cover_a_text_and_no_two_more_than_needed() -> None:
    room, stride = 7, 3
    for count in range(40):
        starts = list(window_starts(count, room, stride))
        assert starts == [k * (room - stride) for k in range(len(starts))]
        assert {i for start in starts for i in range(start, min(start + room, count))} == set(range(count))
        assert len(starts) == 1 or starts[-2] + room < count, "the last window is needed"


def test_every_window_is_a_question_and_a_piece_of_its_text(tmp_path: Path) -> None:
    data, (_, dev) = prepare(tmp_path), read_squad(SAMPLES / "SQuAD")
    cls, sep = (tiny_tokenizer().token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows, held = rows_of(data.test), 0
    for number, question in enumerate(dev):
        windows = np.flatnonzero(data.test.question_N == number)
        head, context = [cls, *ids_of(question.question), sep], ids_of(question.context)
        room = LENGTH - len(head) - 1
        assert len(windows) > 2
        for window, start in zip(windows, window_starts(len(context), room, STRIDE), strict=True):
            piece = context[start : start + room]
            assert rows[window] == [*head, *piece, sep]
            assert data.test.first_N[window] == len(head)
            text = data.test.text(int(window), len(head), len(rows[window]) - 2)
            assert text in question.context
            assert letters(text) == "".join(tiny_tokenizer().id_to_token(i).removeprefix("##") for i in piece)
            held += check_span(data.test, int(window), question, text)
    assert held > 2
    assert data.test.references == [[answer.text for answer in question.answers] for question in dev]


def check_span(table: AnswerTable, window: int, question: Question, seen: str) -> bool:
    """A window is trained on the first answer if it has all of it; it occurs once in these texts."""
    first, last = table.target_N[window]
    if not question.answers or question.answers[0].text not in seen:
        assert (first, last) == NO_ANSWER
        return False
    assert table.text(window, first, last) == question.answers[0].text
    return True


@pytest.mark.parametrize("begin", range(18))
def test_only_a_window_with_all_of_an_answer_has_it(begin: int) -> None:
    """A text of 20 tokens in windows of 8, each 5 after the one before; an answer of 3."""
    text = " ".join("abcdefghijklmnopqrst")
    question = Question("q", "?", text, (Answer(text[2 * begin : 2 * begin + 5], 2 * begin),))
    found = windows_of(tiny_tokenizer(), [question], 12, 3, "test", SILENT)
    wanted = [
        (3 + begin - start, 3 + begin + 2 - start) if start <= begin and begin + 2 < start + 8 else NO_ANSWER
        for start in (0, 5, 10, 15)
    ]
    assert [tuple(span) for span in found.span_N2.tolist()] == wanted


def test_an_answer_is_where_the_file_says_and_not_where_its_words_are_first() -> None:
    question = Question("q", "which?", "a fox, a  F\u00f3x; the fox", (Answer("F\u00f3x", 10),))
    found = windows_of(tiny_tokenizer(), [question], 40, 0, "test", SILENT)
    (first, last), place_M2 = found.span_N2[0], found.place_M2
    assert place_M2[first : last + 1].tolist() == [[10, 11], [11, 12], [12, 13]]


def test_an_answer_within_a_word_is_the_tokens_it_touches_and_one_without_tokens_is_none() -> None:
    within, between = (
        Question("q", "?", "snowfall", (Answer("owf", 2),)),
        Question("q", "?", "snow  fall", (Answer(" ", 4),)),
    )
    found = windows_of(tiny_tokenizer(), [within, between], 40, 0, "test", SILENT)
    assert (found.span_N2[0] - found.rows.first_N[0]).tolist() == [2, 4]
    assert tuple(found.span_N2[1]) == NO_ANSWER


def test_a_text_of_no_tokens_and_no_questions_are_windows_too() -> None:
    found = windows_of(tiny_tokenizer(), [Question("q", "which?", " ", ())], 20, 4, "test", SILENT)
    assert len(found.rows.token_M) == found.rows.first_N[0] + 1
    none = windows_of(tiny_tokenizer(), [], 20, 4, "test", SILENT)
    assert (none.span_N2.shape, none.place_M2.shape, none.rows.start_P.tolist()) == ((0, 2), (0, 2), [0])


def test_no_context_is_in_two_parts_and_no_question_lost(tmp_path: Path) -> None:
    data = prepare(tmp_path)
    train, dev = read_squad(SAMPLES / "SQuAD")
    parts = {"train": data.train, "val": data.val, "test": data.test}
    contexts = {part: set(json.loads(table.written_J.tobytes())["contexts"]) for part, table in parts.items()}
    assert contexts["train"] | contexts["val"] == {question.context for question in train}
    assert not contexts["train"] & contexts["val"]
    assert len(contexts["val"]) == 1
    counts = {part: len(table.references) for part, table in parts.items()}
    assert data.manifest["questions"] == counts
    assert counts["train"] + counts["val"] == len(train)
    assert counts["test"] == len(dev)
    assert data.manifest["counts"] == {part: len(table) for part, table in parts.items()}
    assert data.manifest["left_out"] == {"in_test": 0}
    splits = {tuple(map(tuple, prepare(tmp_path, seed=seed).val.references)) for seed in range(4)}
    assert len(splits) > 1


def test_a_text_of_the_test_part_is_not_learnt_from(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    shutil.copytree(SAMPLES / "SQuAD", root)
    train, dev = (json.loads((root / name).read_text()) for name in (TRAIN_FILE, DEV_FILE))
    spaced = json.loads(json.dumps(train["data"][0]).replace("Its lamp", "ITS  LAMP"))
    for item in spaced["paragraphs"][0]["qas"]:
        item |= {"answers": [], "is_impossible": True}
    (root / DEV_FILE).write_text(json.dumps({"data": [*dev["data"], spaced]}))
    data = prepare(tmp_path, root=root)
    assert data.manifest["left_out"] == {"in_test": 4}
    assert data.manifest["questions"] == {"train": 8, "val": 2, "test": 7}


def test_answers_that_no_window_holds_are_counted(tmp_path: Path) -> None:
    """Longer than what a question leaves of a row; a longer row holds them all."""
    assert prepare(tmp_path, max_length=58, stride=2).manifest["in_no_window"]["test"] == 0
    assert sum(prepare(tmp_path, max_length=44, stride=2).manifest["in_no_window"].values()) > 0


def test_prepared_once_for_each_length_and_stride(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(tmp_path)
    assert not np.array_equal(prepare(tmp_path, stride=STRIDE + 1).train.token_M, data.train.token_M)
    monkeypatch.setattr(prepared_questions, "_build", lambda *_: pytest.fail("prepared again"))
    assert_same_arrays(prepare(tmp_path), data)
    assert isinstance(data.train.token_M, np.memmap)
    changed = Path(shutil.copytree(SAMPLES / "SQuAD", tmp_path / "changed"))
    with (changed / DEV_FILE).open("a") as file:
        file.write("\n")
    with pytest.raises(pytest.fail.Exception, match="prepared again"):
        prepare(tmp_path, root=changed)


def test_a_batch_has_the_ends_of_its_answers(tmp_path: Path) -> None:
    table = prepare(tmp_path).train
    rows = np.flatnonzero(table.target_N.any(axis=1))[:3]
    batch = table.batch(rows, rows)
    assert np.array_equal(batch.label_B.numpy(), table.target_N[rows])
    assert batch.type_BS is not None
    for row, length, types in zip(rows, batch.length_B.tolist(), batch.type_BS.tolist(), strict=True):
        head = int(table.first_N[row])
        assert types == [0] * head + [1] * (length - head) + [0] * (len(types) - length)


def test_a_data_root_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no package carries SQuAD v2\. Remedy: .*train-v2\.0\.json and dev-v2\.0"):
        prepare(tmp_path, root=None)


def test_a_question_that_leaves_too_little_of_a_row_is_named(tmp_path: Path) -> None:
    longest = max(len(ids_of(question.question)) for part in read_squad(SAMPLES / "SQuAD") for question in part)
    least = longest + 3 + STRIDE + 1
    prepare(tmp_path, max_length=least)
    message = rf"data\.max_length={least - 1}: the question '.*' has {longest} tokens, which leaves {STRIDE} for its"
    with pytest.raises(UserError, match=rf"{message}.*data\.stride={STRIDE}.* at least {least}"):
        prepare(tmp_path, max_length=least - 1)


def test_a_tokenizer_that_writes_pairs_in_another_way_is_refused(tmp_path: Path) -> None:
    other: Tokenizer = tiny_tokenizer()
    ids = {token: other.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    other.post_processor = processors.RobertaProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    with pytest.raises(UserError, match=r"data\.tokenizer does not write a pair as \[CLS\] question \[SEP\] text"):
        prepare_questions(config_of(tmp_path), other, progress=False)


def test_the_first_questions_to_train_on_are_a_sample_of_all() -> None:
    """The importance of neurons is measured on them; the files go from article to article."""
    train = [Question(f"{text}.{n}", "which?", f"text {text}", ()) for text in range(40) for n in range(3)]
    dev = [Question("d", "which?", "another text", ())]
    parts, _ = prepared_questions._parts(train, dev, seed=0)
    assert {q.identity for q in parts["train"] + parts["val"]} == {q.identity for q in train}
    assert len({question.context for question in parts["train"][:20]}) > 12
    assert parts["test"] == dev
    assert parts == prepared_questions._parts(train, dev, seed=0)[0]
