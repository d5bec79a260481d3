"""Where the weights of a new run come from: the section ``start``, open to the user's own modules.

A start belongs to models by name. It checks before any process group exists that it can be had and fits, and later
fills the model on every rank.
"""

from dist_moe.recipes.supervised.start.bert import BertStart
from dist_moe.recipes.supervised.start.decoder import DecoderStart
from dist_moe.recipes.supervised.start.settings import STARTS, StartConfig, StartSettings

for _settings in (BertStart, DecoderStart):
    STARTS.register(_settings)

__all__ = ["STARTS", "BertStart", "DecoderStart", "StartConfig", "StartSettings"]
