"""Discovered domains: what they are made of, that prefixes give what whole texts do, and that nothing looks ahead."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.data.text.clusters import (
    ClusterConfig,
    Clusterer,
    discover,
    normalised,
    prefix_log_weights,
    prefix_vectors,
    texts_of_rows,
    words_of,
)
from dist_moe.errors import UserError

from .conftest import SMALL
from .test_own_tokenizer import sentence_piece
from .tiny_text import WORDS

COUNT = 3


@pytest.fixture(scope="session")
def clustered(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    config = TextConfig(root=root, cache=tmp_path_factory.mktemp("cache"), clusters={"count": COUNT}, **SMALL)
    return prepare_text(config, progress=False)


def test_training_sequences_fall_into_equal_shares_that_are_the_three_kinds_of_text(clustered: Text) -> None:
    """Which were in directories apart; at borders between documents of different kinds there are none."""
    assert clustered.domains == ("cluster-0", "cluster-1", "cluster-2")
    sizes = np.bincount(clustered.train.domain_N, minlength=COUNT)
    assert sizes.max() - sizes.min() <= 1
    for entry in clustered.manifest["clusters"].values():
        kinds = [kind for kind, words in WORDS.items() for word in entry["words"] if word in words]
        assert max(map(kinds.count, kinds)) > len(kinds) / 2
    assert "its words" in clustered.summary()


def test_sequences_and_their_order_are_those_of_the_text_by_provenance(clustered: Text, text: Text) -> None:
    for part in ("train", "val", "test"):
        one, other = getattr(clustered, part), getattr(text, part)
        np.testing.assert_array_equal(one.start_N, other.start_N)
        np.testing.assert_array_equal(one.token_M, other.token_M)
    assert clustered.manifest["files"].keys() > text.manifest["files"].keys()


def test_other_parts_are_assigned_to_the_nearest_centre(clustered: Text) -> None:
    assert clustered.clusterer is not None
    for part in ("val", "test"):
        table = getattr(clustered, part)
        rows = list(table.windows(np.arange(len(table))))
        texts = texts_of_rows(clustered.tokenizer, clustered.end_of_text, rows)
        np.testing.assert_array_equal(clustered.clusterer.assign(texts), table.domain_N)


def test_some_domains_stay_as_they_are(root: Path, text: Text, tmp_path: Path) -> None:
    clusters = {"count": 2, "domains": ["numbers", "sea"]}
    mixed = prepare_text(TextConfig(root=root, cache=tmp_path, clusters=clusters, **SMALL), progress=False)
    assert mixed.domains == ("cluster-0", "cluster-1", "letters")
    np.testing.assert_array_equal(mixed.train.domain_N == 2, text.train.domain_N == text.domains.index("letters"))
    sizes = np.bincount(mixed.train.domain_N)
    assert abs(sizes[0] - sizes[1]) <= 1


def test_the_same_again_from_the_cache_and_from_anew(root: Path, clustered: Text, tmp_path: Path) -> None:
    config = TextConfig(root=root, cache=tmp_path, clusters={"count": COUNT}, **SMALL)
    first, second = (prepare_text(config, progress=False) for _ in range(2))
    for other in (first, second):
        np.testing.assert_array_equal(other.train.domain_N, clustered.train.domain_N)
        assert other.manifest["files"] == clustered.manifest["files"]
    fewer = config.model_copy(update={"clusters": ClusterConfig(count=2)})
    assert len(prepare_text(fewer, progress=False).domains) == 2


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ({"count": 2, "domains": ["land"]}, "data.clusters.domains: there is no domain land"),
        ({"count": 60_000}, "data.clusters.count=60000 exceeds the"),
        ({"count": 60}, "no sequence of the val part belongs to"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, tmp_path: Path, clusters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_text(TextConfig(root=root, cache=tmp_path, clusters=clusters, **SMALL), progress=False)


def test_text_without_words_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no words to tell domains by"):
        discover(["the 12 a", "1st of 3"], ClusterConfig(count=1))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'comet-dist-moe\[clusters\]'"):
        discover(["sea ship"], ClusterConfig(count=1))


def test_vectors_are_those_of_tf_idf_and_svd() -> None:
    """Computed text by text from sums over words, against scikit-learn on whole documents."""
    draw = np.random.default_rng(0)
    words = ["ship", "whale", "sail", "oven", "bread", "salt", "the", "and", "4th", "55", "x"]
    texts = [" ".join(draw.choice(words, size=30)) + " Ship." for _ in range(40)]
    clusterer, cluster_N, _ = discover(texts, ClusterConfig(count=4, dimensions=3))
    pattern = r"(?u)\b[^\W\d]\w+\b"
    vectorizer = TfidfVectorizer(token_pattern=pattern, stop_words=list(ENGLISH_STOP_WORDS))
    tfidf = vectorizer.fit_transform(texts)
    expected = normalised(TruncatedSVD(3, random_state=0).fit_transform(tfidf))
    np.testing.assert_allclose(clusterer.embed(texts), expected, atol=1e-5)
    assert np.bincount(cluster_N).tolist() == [10, 10, 10, 10]
    assert words_of("The 2nd Whale_boat, a x 3.5 ÉTÉ") == ["the", "whale_boat", "été"]
    assert not clusterer.embed(["", "the 7"]).any()


def prefixes_anew(text: Text, token_S: list[int]) -> NDArray[np.float64]:
    """(S, D) vectors of all prefixes, each decoded and embedded by itself, up to the last whole character."""
    assert text.clusterer is not None
    found = []
    for t in range(len(token_S)):
        prefix, until = "\ufffd", t + 1
        while prefix.endswith("\ufffd"):
            (prefix,) = texts_of_rows(text.tokenizer, text.end_of_text, [token_S[:until]])
            until -= 1
        found.append(text.clusterer.vector_of(prefix))
    return np.array(found)


@pytest.mark.parametrize("name", ["learned", "sentence_piece"])
def test_growing_prefixes_have_the_vectors_of_whole_ones(root: Path, text: Text, tmp_path: Path, name: str) -> None:
    """Words, characters and documents that end within a sequence among them."""
    sentence_piece().save(str(tmp_path / "tokenizer.json"))
    own = {} if name == "learned" else {"tokenizer": tmp_path / "tokenizer.json"}
    config = TextConfig(root=root, cache=tmp_path, clusters={"count": COUNT}, **SMALL | own)
    clustered = prepare_text(config, progress=False)
    assert clustered.clusterer is not None
    index = np.arange(min(len(clustered.test), 80))
    token_BS = clustered.test.batch(index, index).token_BS.reshape(-1, 32).numpy()
    assert (token_BS == clustered.end_of_text).any(axis=1).sum() > 1
    found = prefix_vectors(clustered.clusterer, clustered.tokenizer, clustered.end_of_text, token_BS)
    for vector_SD, token_S in zip(found, token_BS.tolist(), strict=True):
        np.testing.assert_allclose(vector_SD, prefixes_anew(clustered, token_S), atol=1e-6)


@given(data=st.data())
def test_no_weight_depends_on_a_later_token(clustered: Text, data: st.DataObject) -> None:
    """Rows of any tokens, characters that never end among them."""
    assert clustered.clusterer is not None
    ids = st.integers(0, clustered.vocab_size - 1)
    token_S = data.draw(st.lists(ids, min_size=2, max_size=24))
    place = data.draw(st.integers(1, len(token_S) - 1))
    other_S = [*token_S[:place], data.draw(ids), *token_S[place + 1 :]]
    token_BS = np.array([token_S, other_S])
    both = prefix_vectors(clustered.clusterer, clustered.tokenizer, clustered.end_of_text, token_BS)
    weights = prefix_log_weights(clustered.clusterer, both, range(COUNT))
    np.testing.assert_array_equal(weights[:, 0, :place], weights[:, 1, :place])


def toy() -> Clusterer:
    centres = np.array([[1.0, 0.0], [0.6, 0.6], [0.0, 0.5], [-1.0, 0.0]])
    return Clusterer(("sail", "oven"), np.array([[2.0, 0.0], [0.0, 1.0]], dtype=np.float32), centres)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
def test_weights_fall_with_the_squared_distance(doubled: bool, top_k: int | None) -> None:
    vector_BSD = np.array([[[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [0.0, 9.0], [6.0, 1.0]]])
    found = prefix_log_weights(toy(), vector_BSD, [0, 1, 3], temperature=0.5, doubled_square=doubled, top_k=top_k)
    for b in range(2):
        for t in range(3):
            vector = vector_BSD[b, t]
            unit = vector / np.linalg.norm(vector) if vector.any() else vector
            squares = [((unit - toy().centre_KD[k]) ** 2).sum() for k in (0, 1, 3)]
            scores = np.array([np.exp(-(s**2 if doubled else s) / 0.5) if vector.any() else 1.0 for s in squares])
            if top_k is not None:
                scores[np.argsort(-scores, kind="stable")[top_k:]] = 0.0
            np.testing.assert_allclose(np.exp(found[:, b, t]), scores / scores.sum(), atol=1e-12)


def test_a_clusterer_comes_back_from_its_file(clustered: Text, tmp_path: Path) -> None:
    assert clustered.clusterer is not None
    path = tmp_path / "clusters.npz"
    clustered.clusterer.save(path)
    again = Clusterer.load(path)
    assert again.words == clustered.clusterer.words
    np.testing.assert_array_equal(again.vector_VD, clustered.clusterer.vector_VD)
    np.testing.assert_array_equal(again.centre_KD, clustered.clusterer.centre_KD)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="has no clusters of words"):
        Clusterer.load(path)
