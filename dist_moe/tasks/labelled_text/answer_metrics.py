"""Exact match and F1 of extracted answers, by the rules of SQuAD v2's official evaluation (Rajpurkar et al. 2018).

Answers are compared in lower case, without punctuation (ASCII), without the articles a, an and the, and with single
spaces. A question without an answer has the empty answer. Of several reference answers the best one counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """What of an answer is compared. Punctuation goes before articles do: "a.b" is one word."""
    words = answer.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split())


def exact_match(predicted: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0. No references: the question has no answer."""
    return max(float(normalised(predicted) == normalised(reference)) for reference in _usable(references))


def answer_f1(predicted: str, references: Sequence[str]) -> float:
    """The best F1 of words, counted with repetitions; where one side is empty, 1 if both are, else 0."""
    return max(_f1(normalised(predicted).split(), normalised(reference).split()) for reference in _usable(references))


def answer_metrics(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over N questions: ``exact_match`` and ``f1``, of all and of those with and without an answer.

    Args:
        predicted: N answers, empty where the question is taken to have none.
        references: N lists of right answers, empty where the question has none.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    scores = [
        (exact_match(ours, theirs), answer_f1(ours, theirs), bool(theirs))
        for ours, theirs in zip(predicted, references, strict=True)
    ]
    answered = [score for score in scores if score[2]]
    without = [score for score in scores if not score[2]]
    metrics = {}
    for suffix, group in (("", scores), ("_answered", answered), ("_unanswerable", without)):
        for place, name in enumerate(("exact_match", "f1")):
            metrics[name + suffix] = sum(score[place] for score in group) / len(group) if group else 0.0
    return metrics


def _usable(references: Sequence[str]) -> Sequence[str]:
    """Those of which something is left; the empty answer if there is none."""
    return [reference for reference in references if normalised(reference)] or [""]


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * common / (len(predicted) + len(reference))
