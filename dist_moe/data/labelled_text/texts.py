"""Labelled texts as they are published, without repetitions, and shared out to train, validate and test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.prepared import PARTS, split_off_tenths

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
    """A data set as it is published. ``test``: None where no test part is marked. ``left_out``: rows of the files that
    are not here, counted by reason."""

    train: LabelledTexts
    test: LabelledTexts | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def identity(text: TextOrPair) -> TextOrPair:
    """Return what makes two texts the same: their words; neither case nor spacing."""
    return tuple(" ".join(part.casefold().split()) for part in text)


def parts_of(published: Published, seed: int, *, stratified: bool) -> tuple[dict[str, LabelledTexts], dict[str, int]]:
    """Return train, val and test, no text of one in another, split by a seed; and what is left out, counted by reason.

    Of texts that occur several times with one target the first is kept; those with several targets are left out.
    Without a published test part the split is 80/10/10; with one, which is kept whole, what it contains is taken out of
    the rest, and of this a tenth is for validation. ``stratified``: targets are classes, whose shares are kept.
    """
    rows: dict[TextOrPair, list[int]] = defaultdict(list)
    for i, text in enumerate(published.train.texts):
        rows[identity(text)].append(i)
    agreeing = {key: group for key, group in rows.items() if len({published.train.targets[i] for i in group}) == 1}
    repeated = sum(map(len, agreeing.values())) - len(agreeing)
    contradictory = len(published.train) - repeated - len(agreeing)
    left_out = published.left_out | {"repeated": repeated, "contradictory": contradictory}
    known = set(map(identity, published.test.texts)) if published.test is not None else set()
    distinct = published.train.take([group[0] for key, group in agreeing.items() if key not in known])
    classes_N = np.array(distinct.targets if stratified else np.zeros(len(distinct)), dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(seed))
    if published.test is not None:
        left_out["in_test"] = len(agreeing) - len(distinct)
        train, val = map(distinct.take, split_off_tenths(classes_N, 1, rng))
        test = published.test
    else:
        train, val, test = map(distinct.take, split_off_tenths(classes_N, 2, rng))
    return dict(zip(PARTS, (train, val, test), strict=True)), left_out
