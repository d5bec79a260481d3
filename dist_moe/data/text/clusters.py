"""Domains that are discovered: clusters of sequences by the words in them (Gururangan et al., c-BTM, 2023).

    text -> tf-idf of its words -> truncated SVD -> a unit vector -> the nearest of K centres

The centres are those of a balanced k-means over training sequences. A tf-idf vector is a sum over words but for its
length, and so is what a linear map makes of it: with u_w the word's inverse document frequency times its row of the
SVD, a text is normalise(sum_w u_w) over its words w, each as often as it occurs. So the vector of a prefix is that of
the one before it and its new words, and no text is read twice, see :class:`PrefixReader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dist_moe.config.settings import LARGEST_COUNT, LARGEST_SIZE, Settings
from dist_moe.data.text.balanced_k_means import balanced_k_means, nearest, squared_distances
from dist_moe.errors import UserError

WORDS = 50_000
"""Words that vectors are made of, the most frequent ones."""

TOP_WORDS = 8
"""Words by which a cluster is described."""

_WORD, _UNFINISHED_WORD = re.compile(r"\w+"), re.compile(r"\w*\Z")


class ClusterConfig(Settings):
    """How domains are discovered, and in what."""

    count: int = Field(ge=1, le=LARGEST_COUNT, description="Domains to discover; of equal size in the training part.")
    domains: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Discover them in these domains; all others stay as they are. If not given, in all.",
    )
    dimensions: int = Field(
        default=100, ge=1, le=LARGEST_SIZE, description="Dimensions to which tf-idf vectors of words are reduced."
    )
    chunk: int = Field(default=50_000, ge=1, description="Sequences that k-means sees at a time.")
    iterations: int = Field(default=20, ge=1, le=LARGEST_COUNT, description="Most iterations of k-means on a chunk.")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Seed of the SVD and of the first centres.")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: letters, digits and underscores, at least two.

    What begins with a digit is no word: c-BTM makes one placeholder of all of it, and a stop word of the placeholder.
    """
    return [word.lower() for word in _WORD.findall(text) if len(word) > 1 and not word[0].isdigit()]


@dataclass(frozen=True)
class Clusterer:
    """Places texts among clusters.

    ``words``: V words, in order, without English stop words. ``vector_VD``: fp32, what each of them adds to a text's
    vector. ``centre_KD``: fp64.
    """

    words: tuple[str, ...]
    vector_VD: NDArray[np.float32]
    centre_KD: NDArray[np.float64]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    @property
    def names(self) -> tuple[str, ...]:
        """The clusters' names as domains."""
        return tuple(f"cluster-{k}" for k in range(len(self.centre_KD)))

    def vector_of(self, text: str) -> NDArray[np.float64]:
        """Return (D,) fp64, the sum over the words of a text, which is not normalised."""
        rows = [self._row_of[word] for word in words_of(text) if word in self._row_of]
        total_D: NDArray[np.float64] = self.vector_VD[rows].sum(axis=0, dtype=np.float64)
        return total_D

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return (N, D) unit vectors, fp64; zeros for a text without any word that is known."""
        return normalised(np.stack([self.vector_of(text) for text in texts]))

    def assign(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return (N,) the cluster of the nearest centre."""
        return nearest(self.embed(texts), self.centre_KD)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all of it as arrays, from which :meth:`of` makes it again."""
        packed = np.frombuffer("\n".join(self.words).encode(), dtype=np.uint8)
        return {"words": packed, "vectors": self.vector_VD, "centres": self.centre_KD}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Clusterer:
        """Return the clusterer that gave ``arrays``."""
        words = arrays["words"].tobytes().decode().split("\n")
        return cls(tuple(words), np.asarray(arrays["vectors"]), np.asarray(arrays["centres"]))

    def save(self, path: Path) -> None:
        """Write it as a file .npz, without pickle. Raises OSError."""
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls, path: Path) -> Clusterer:
        """Read what :meth:`save` wrote. Raises UserError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls.of({name: arrays[name] for name in ("words", "vectors", "centres")})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path} has no clusters of words: {error}; put back what was written") from error


def normalised(vector_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors of length 1 along the last axis; zeros stay zeros."""
    length_N1 = np.linalg.norm(vector_ND, axis=-1, keepdims=True)
    return vector_ND / np.where(length_N1 > 0, length_N1, 1.0)


def discover(texts: Sequence[str], config: ClusterConfig) -> tuple[Clusterer, NDArray[np.int64], list[list[str]]]:
    """Return a clusterer of ``texts``, (N,) the cluster of each in sizes that differ by one at most, and top words.

    The top words of a cluster are those whose tf-idf is the most above that of all texts. Raises UserError for fewer
    texts than clusters, for texts without words, and where scikit-learn is missing.
    """
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    except ImportError as error:
        raise UserError(
            "data.clusters needs scikit-learn; install it by: pip install 'comet-dist-moe[clusters]', or leave it out"
        ) from error
    if len(texts) < config.count:
        raise UserError(
            f"data.clusters.count={config.count} exceeds the {len(texts)} training sequences; give fewer clusters, "
            "more text or shorter sequences (data.sequence_length)"
        )

    def analyzer(text: str) -> list[str]:
        return [word for word in words_of(text) if word not in ENGLISH_STOP_WORDS]

    vectorizer = TfidfVectorizer(analyzer=analyzer, max_features=WORDS)
    try:
        tfidf_NV = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UserError(
            "data.clusters: the text has no words to tell domains by, beside numbers and English stop words; leave it "
            "out"
        ) from error
    dimensions = min(config.dimensions, *tfidf_NV.shape)
    svd = TruncatedSVD(dimensions, random_state=config.seed).fit(tfidf_NV)
    names = tuple(vectorizer.get_feature_names_out().tolist())
    vector_VD = (vectorizer.idf_[:, None] * svd.components_.T).astype(np.float32)
    point_ND = Clusterer(names, vector_VD, np.empty((0, dimensions))).embed(texts)
    found = balanced_k_means(point_ND, config.count, seed=config.seed, chunk=config.chunk, iterations=config.iterations)
    mean_V = np.asarray(tfidf_NV.mean(axis=0)).ravel()
    above_KV = [np.asarray(tfidf_NV[found.cluster_N == k].mean(axis=0)).ravel() - mean_V for k in range(config.count)]
    top = [[names[row] for row in np.argsort(-above_V, kind="stable")[:TOP_WORDS]] for above_V in above_KV]
    return Clusterer(names, vector_VD, found.centre_KD), found.cluster_N, top


class PrefixReader:
    """A text that grows token by token, and its vector after each: as if the text so far had been decoded and embedded.

    A word that may go on counts as far as it goes. A document's end ends a word, and nothing is forgotten there.
    """

    def __init__(self, clusterer: Clusterer, tokenizer: Tokenizer, end_of_text: int) -> None:
        self._clusterer, self._tokenizer, self._end_of_text = clusterer, tokenizer, end_of_text
        self._stream = DecodeStream(skip_special_tokens=False)
        self._unfinished = ""
        self._finished_D = np.zeros(clusterer.vector_VD.shape[1])

    def add(self, token: int) -> NDArray[np.float64]:
        """Return (D,) the vector of the text up to and with ``token``, which is not normalised."""
        if token == self._end_of_text:
            self._stream, text = DecodeStream(skip_special_tokens=False), self._unfinished + "\n"
        else:
            # A token that ends within a character gives nothing; it counts when the character is whole.
            text = self._unfinished + (self._stream.step(self._tokenizer, token) or "")
        begin = _UNFINISHED_WORD.search(text).start()  # type: ignore[union-attr]  # it matches nothing, too
        self._unfinished = text[begin:]
        if begin:
            self._finished_D = self._finished_D + self._clusterer.vector_of(text[:begin])
        return self._finished_D + self._clusterer.vector_of(self._unfinished)


def prefix_log_weights(
    clusterer: Clusterer,
    vector_BSD: NDArray[np.float64],
    clusters: Sequence[int],
    *,
    temperature: float = 0.1,
    doubled_square: bool = False,
    top_k: int | None = None,
) -> NDArray[np.float64]:
    """Return (J, B, S) fp64 log-weights of ``clusters`` after each prefix: w_j ~ exp(-d_j^2 / temperature), sum 1.

    ``vector_BSD``: of :func:`prefix_vectors`; d_j is the distance of their direction from a centre. Where no word is
    known yet, all weights are equal. ``doubled_square``: d^4 in place of d^2, as the released scorer computes it, whose
    distances are squared already. ``top_k``: only so many clusters, the nearest (the first of equally near ones).
    """
    unit_ND = normalised(vector_BSD.reshape(-1, vector_BSD.shape[-1]))
    square_NJ = squared_distances(unit_ND, clusterer.centre_KD[list(clusters)])
    score_NJ = -(square_NJ**2 if doubled_square else square_NJ) / temperature
    score_NJ[~unit_ND.any(axis=1)] = 0.0
    if top_k is not None and top_k < len(clusters):
        left_out_NK = np.argsort(-score_NJ, axis=1, kind="stable")[:, top_k:]
        np.put_along_axis(score_NJ, left_out_NK, -np.inf, axis=1)
    log_weight_NJ = score_NJ - np.logaddexp.reduce(score_NJ, axis=1, keepdims=True)
    return log_weight_NJ.T.reshape(len(clusters), *vector_BSD.shape[:-1])


def prefix_vectors(
    clusterer: Clusterer, tokenizer: Tokenizer, end_of_text: int, token_BS: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Return (B, S, D): the vector at place t is that of the tokens 0..t of its row, in time linear in the tokens."""
    vector_BSD = np.empty((*token_BS.shape, clusterer.vector_VD.shape[1]))
    for vector_SD, token_S in zip(vector_BSD, token_BS.tolist(), strict=True):
        reader = PrefixReader(clusterer, tokenizer, end_of_text)
        for t, token in enumerate(token_S):
            vector_SD[t] = reader.add(token)
    return vector_BSD


def texts_of_rows(tokenizer: Tokenizer, end_of_text: int, token_NS: Iterable[Sequence[int]]) -> list[str]:
    """Return the text of each row of tokens, its documents apart by line ends."""
    texts = []
    for token_S in token_NS:
        ends = [i for i, token in enumerate(token_S) if token == end_of_text]
        begins = [0, *(end + 1 for end in ends)]
        pieces = [list(token_S[b:e]) for b, e in zip(begins, [*ends, len(token_S)], strict=True)]
        texts.append("\n".join(tokenizer.decode_batch(pieces, skip_special_tokens=False)))
    return texts
