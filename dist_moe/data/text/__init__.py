"""Real text for language models, by domain: `prepare_text` gives tables of token sequences.

`sources` and `brown` know where the texts come from, `documents` what becomes of them, `tokenizer` how they
are cut into tokens, `tokens` how sequences and batches are read, `clusters` how domains are discovered. See
docs/text.md.
"""

from dist_moe.data.text.prepare import Text, TextConfig, prepare_text
from dist_moe.data.text.tokens import TokenBatch, TokenTable

__all__ = ["Text", "TextConfig", "TokenBatch", "TokenTable", "prepare_text"]
