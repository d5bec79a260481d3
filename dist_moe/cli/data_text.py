"""dist-moe data fetch text | brown: what there is of every domain."""

from __future__ import annotations

import argparse

from dist_moe.data.text import TextConfig, prepare_text

PARTS = ("train", "val", "test")


def fetch_text(options: argparse.Namespace) -> int:
    """Prepare the corpus with its standard settings, and print a line per domain, in tokens of its vocabulary."""
    config = TextConfig(name=options.name, root=options.data_root)
    text = prepare_text(config)
    domains = text.manifest["domains"]
    width = max(map(len, domains))
    print(f"{'domain':{width}}  documents       MB  tokens: train        val       test")
    for name, entry in domains.items():
        documents, size = sum(entry["documents"].values()), sum(entry["bytes"].values()) / 1e6
        tokens = "".join(f"{entry['tokens'][part]:>11,}" for part in PARTS)
        print(f"{name:{width}}  {documents:>9,} {size:>8.2f}        {tokens}")
    print(
        f"{options.name}: {len(domains)} domains, {text.vocab_size:,} tokens in the vocabulary, sequences of "
        f"{config.sequence_length} to train on {len(text.train):,}, to validate {len(text.val):,}, "
        f"to test {len(text.test):,}"
    )
    return 0
