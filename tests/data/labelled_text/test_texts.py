"""Repetitions and the split: no text in two parts, classes in their shares, nothing lost uncounted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_moe.data.labelled_text.texts import LabelledTexts, Published, identity, parts_of

WORDS = st.sampled_from(["a", "A", "a b", "A  b", " a B", "c", "d", "e f", "g"])
EXAMPLES = st.lists(st.tuples(st.tuples(WORDS, WORDS), st.integers(0, 2)), min_size=1, max_size=40)
Example = tuple[tuple[str, str], int]


def labelled(examples: list[Example]) -> LabelledTexts:
    return LabelledTexts([text for text, _ in examples], [float(target) for _, target in examples])


def identities(texts: LabelledTexts) -> list[tuple[str, ...]]:
    return [identity(text) for text in texts.texts]


def test_case_and_spacing_do_not_make_a_text_another() -> None:
    assert identity(("  The\tKEY ", "Straße")) == identity(("the key", "STRASSE"))
    assert identity(("a", "b")) != identity(("b", "a"))
    assert identity(("a b", "c")) != identity(("a", "b c"))


@given(EXAMPLES, st.integers(0, 3))
def test_no_text_is_twice_in_the_parts(examples: list[Example], seed: int) -> None:
    parts, left_out = parts_of(Published(labelled(examples)), seed, stratified=True)
    everywhere = [key for part in parts.values() for key in identities(part)]
    assert len(everywhere) == len(set(everywhere))
    targets: dict[tuple[str, ...], set[int]] = {}
    for text, target in examples:
        targets.setdefault(identity(text), set()).add(target)
    assert set(everywhere) == {key for key, found in targets.items() if len(found) == 1}
    assert sum(map(len, parts.values())) + sum(left_out.values()) == len(examples)


@given(EXAMPLES, EXAMPLES, st.integers(0, 3))
def test_a_published_test_part_stays_whole_and_is_known_to_no_other(
    train: list[Example], test: list[Example], seed: int
) -> None:
    parts, left_out = parts_of(Published(labelled(train), labelled(test)), seed, stratified=True)
    assert parts["test"] == labelled(test)
    learnt = identities(parts["train"]) + identities(parts["val"])
    assert not set(learnt) & set(identities(parts["test"]))
    assert len(learnt) == len(set(learnt))
    assert len(learnt) + sum(left_out.values()) == len(train)


def test_what_is_left_out_is_counted() -> None:
    examples: list[Example] = [
        (("one", ""), 0),
        (("ONE", ""), 0),
        (("two", ""), 0),
        (("two ", ""), 1),
        (("Two", ""), 0),
        (("three", ""), 1),
        (("tested", ""), 1),
    ]
    published = Published(labelled(examples), labelled([(("Tested", ""), 1)]), {"neutral": 4})
    parts, left_out = parts_of(published, 0, stratified=True)
    assert sorted(parts["train"].texts + parts["val"].texts) == [("one", ""), ("three", "")]
    assert left_out == {"neutral": 4, "repeated": 1, "contradictory": 3, "in_test": 1}


def test_the_split_is_the_seeds() -> None:
    examples = labelled([((f"w{i}", ""), i % 2) for i in range(200)])
    first, again, other = (parts_of(Published(examples), seed, stratified=True)[0] for seed in (0, 0, 1))
    assert first == again
    assert set(first["test"].texts) != set(other["test"].texts)
    assert list(map(len, first.values())) == [160, 20, 20]
    assert first["train"].texts != sorted(first["train"].texts)


def test_numbers_are_not_kept_in_shares() -> None:
    """Every number is different: nothing could be held out of a class of one."""
    examples = LabelledTexts([(f"w{i}",) for i in range(50)], [i / 7 for i in range(50)])
    parts, _ = parts_of(Published(examples), 0, stratified=False)
    assert list(map(len, parts.values())) == [40, 5, 5]
    val = parts["val"]
    assert all(target == int(text[0][1:]) / 7 for text, target in zip(val.texts, val.targets, strict=True))
