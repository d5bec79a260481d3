"""Labelled texts as they are published, without repetitions, and shared out to train, validate and test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TextOrPair = tuple[str, ...]
"""One text, or the two of a pair."""


@dataclass(frozen=True)
class LabelledTexts:
    """N texts or pairs and their targets: class numbers, or the numbers to be predicted."""

    texts: list[TextOrPair]
    targets: list[float]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.targets)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> LabelledTexts:
        """Return the given rows, in their order."""
        return LabelledTexts([self.texts[i] for i in rows], [self.targets[i] for i in rows])


@dataclass(frozen=True)
class Published:
    """A data set as it is published. ``test``: None where no test part is marked. ``left_out``: rows that are
    in the files and not here, counted by reason."""

    train: LabelledTexts
    test: LabelledTexts | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """Examples to train, validate and test on: no text of one is in another. ``left_out``: as in `Published`."""

    train: LabelledTexts
    val: LabelledTexts
    test: LabelledTexts
    left_out: dict[str, int]


def identity(text: TextOrPair) -> TextOrPair:
    """Return what makes two texts the same: their words; neither case nor spacing."""
    return tuple(" ".join(part.casefold().split()) for part in text)


def parts_of(published: Published, seed: int, *, stratified: bool) -> Parts:
    """Take repetitions out, then split by a seed; a published test part is kept whole.

    Of texts that occur several times with one target the first is kept; those with several targets are left
    out. Without a published test part the split is 80/10/10; with one, what it contains is taken out of the
    rest, and of this a tenth is for validation. ``stratified``: targets are classes, whose shares are kept.
    """
    distinct, left_out = without_repetitions(published.train)
    if published.test is not None:
        known = set(map(identity, published.test.texts))
        fresh = [i for i, text in enumerate(distinct.texts) if identity(text) not in known]
        left_out["in_test"] = len(distinct) - len(fresh)
        distinct = distinct.take(fresh)
    classes_N = np.array(distinct.targets if stratified else np.zeros(len(distinct)), dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(seed))
    if published.test is not None:
        train_N, val_N = dealt(classes_N, 1, rng)
        test = published.test
    else:
        train_N, val_N, test_N = dealt(classes_N, 2, rng)
        test = distinct.take(test_N)
    return Parts(distinct.take(train_N), distinct.take(val_N), test, published.left_out | left_out)


def without_repetitions(examples: LabelledTexts) -> tuple[LabelledTexts, dict[str, int]]:
    """Return the first of each text that has one target, and how many rows were ``repeated`` and ``contradictory``."""
    rows: dict[TextOrPair, list[int]] = defaultdict(list)
    for i, text in enumerate(examples.texts):
        rows[identity(text)].append(i)
    agreeing = {key: group for key, group in rows.items() if len({examples.targets[i] for i in group}) == 1}
    kept = [group[0] for group in agreeing.values()]
    repeated = sum(map(len, agreeing.values())) - len(kept)
    left_out = {"repeated": repeated, "contradictory": len(examples) - repeated - len(kept)}
    return examples.take(kept), left_out


def dealt(classes_N: NDArray[np.int64], held_out: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return row numbers to train on, then ``held_out`` times a tenth of each class (halves up), each in random order.

    The parts are disjoint and exhaustive. Only the generator's uniform doubles are drawn, so the result depends
    on its stream alone.
    """
    order_N = np.argsort(rng.random(len(classes_N)), kind="stable")
    part_N = np.zeros(len(classes_N), dtype=np.int64)
    for each in np.unique(classes_N):
        rows = order_N[classes_N[order_N] == each]
        tenth = (len(rows) + 5) // 10
        for part in range(1, held_out + 1):
            part_N[rows[(part - 1) * tenth : part * tenth]] = part
    return [order_N[part_N[order_N] == part] for part in range(held_out + 1)]
