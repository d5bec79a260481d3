"""Experts by name: what ``model.experts: {name: ...}`` in a configuration can mean.

To add an expert type: a bank derived from :class:`ExpertBank`, and settings derived from :class:`ExpertSettings` that
build it, registered here or with ``@EXPERTS.register`` in a module under ``imports``. Plans take the bank's sizes from
its parameters; override ``flops_per_row``, ``kept_per_row`` and ``accesses_per_row`` where these defaults are far off.
A bank that names its ``matrices`` and multiplies by ``grouped`` and ``batched`` can be factored (``model.low_rank``).
"""

from __future__ import annotations

from dist_moe.config.registry import Registry
from dist_moe.experts.bank import ExpertSettings
from dist_moe.experts.conv import ConvConfig
from dist_moe.experts.dense_relu import DenseReLUConfig
from dist_moe.experts.feed_forward import FeedForwardConfig
from dist_moe.experts.mlp import MlpConfig

EXPERTS = Registry("type of expert", ExpertSettings)
for _settings in (DenseReLUConfig, ConvConfig, FeedForwardConfig, MlpConfig):
    EXPERTS.register(_settings)
