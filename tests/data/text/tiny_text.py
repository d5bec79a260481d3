"""A tiny corpus of three domains in a user's own layout, with what real text brings along."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {
    "letters": ["dear", "friend", "yours", "sincerely", "weather", "garden", "naïve", "façade", "東京", "🙂", "☃"],
    "numbers": ["one", "two", "three", "4", "55", "666", "3.14", "1e-9", "½", "<|endoftext|>"],
    "sea": ["ship", "whale", "harpoon", "captain", "tide", "wind", "salt", "—", "“aye”", "x́"],
}
"""Words of several scripts and lengths in bytes, a combining mark, and one that spells out the separator."""


def tiny_documents(seed: int = 0, count: int = 20) -> dict[str, list[str]]:
    """``count`` different documents for each domain, of 20 to 200 words."""
    draw = random.Random(seed)
    return {
        domain: [f"{number} " + " ".join(draw.choices(words, k=draw.randint(20, 200))) for number in range(count)]
        for domain, words in WORDS.items()
    }


def write_text(root: Path, documents: dict[str, list[str]]) -> Path:
    """Write the documents as a user's own directory, and return it."""
    for domain, texts in documents.items():
        (root / domain).mkdir(parents=True)
        for number, text in enumerate(texts):
            (root / domain / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return root


def write_tiny_text(root: Path, *, seed: int = 0, count: int = 20) -> Path:
    return write_text(root, tiny_documents(seed, count))
