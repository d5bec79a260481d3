"""The real texts: counts of every part and class, and no text in two parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.data.labelled_text import LabelledText, LabelledTextConfig, prepare_labelled_text

from .tiny_texts import tiny_tokenizer

pytestmark = pytest.mark.network

FOUND = {
    "sentiment-movies": (10_605, {"neutral": 37, "repeated": 2, "contradictory": 0}, [8452, 1057, 1057]),
    "sentiment-products": (3546, {"neutral": 90, "repeated": 9, "contradictory": 0}, [2759, 344, 344]),
    "sentiment-editorials": (5183, {"neutral": 244, "repeated": 56, "contradictory": 12}, [3897, 487, 487]),
    "sentiment-tweets": (4200, {"neutral": 4, "repeated": 60, "contradictory": 0}, [3308, 414, 414]),
    "trec": (15_452, {"repeated": 10_072, "contradictory": 0}, [4302, 539, 539]),
    "sms-spam": (4837, {"repeated": 326, "contradictory": 0}, [3609, 451, 451]),
    "20-newsgroups": (18_821, {"repeated": 16, "contradictory": 8, "in_test": 7}, [10_134, 1128, 7528]),
}
"""Rows of the published files, what of them is left out, and the parts."""

POSITIVE_OF = {"sentiment-movies": 5242, "sms-spam": 638}
"""As counted in the published files, repetitions included."""


def read(name: str, cache: Path, **fields: Any) -> LabelledText:
    config = LabelledTextConfig.model_validate({"name": name, "cache": cache, "max_length": 16} | fields)
    return prepare_labelled_text(config, tiny_tokenizer(), progress=False)


@pytest.mark.parametrize("name", FOUND)
def test_counts(cache: Path, name: str) -> None:
    published, left_out, counts = FOUND[name]
    data = read(name, cache)
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == counts
    assert data.manifest["left_out"] == left_out
    assert sum(counts) + sum(left_out.values()) == published
    classes = len(data.task.classes)
    shares = [np.bincount(part.target_N, minlength=classes) / len(part) for part in parts]
    assert min(share.min() for share in shares) > 0
    for share in shares[1:]:
        assert np.abs(share - shares[0]).max() < 0.01
    if name in POSITIVE_OF:
        positive = sum(int(part.target_N.sum()) for part in parts)
        assert 0 <= POSITIVE_OF[name] - positive <= left_out["repeated"]


def test_ratings_as_numbers(cache: Path) -> None:
    data = read("sentiment-movies", cache, graded=True)
    assert (len(data.train), len(data.val), len(data.test)) == (8481, 1060, 1060)
    ratings = np.concatenate([part.target_N for part in (data.train, data.val, data.test)])
    assert (ratings.min(), ratings.max()) == pytest.approx((-3.9, 3.9), abs=0.05)
    assert np.count_nonzero(ratings == 0) == 37
