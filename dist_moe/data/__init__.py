"""Real data sets, each fetched from named and verified sources, prepared once and memory-mapped.

A folder per data set, whose settings are registered in `DATA`; ``fetch`` downloads and caches files; ``prepared`` keeps
what is made of them; ``batches`` deals out rows to steps, micro-batches and ranks.
"""

from dist_moe.config.registry import Registry
from dist_moe.data.graphs import NamedGraphConfig, OwnGraphConfig
from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig
from dist_moe.data.movielens import MovieLensConfig
from dist_moe.data.prepared import DataSettings
from dist_moe.data.tables import CensusIncomeConfig, KuaiRandConfig, MovieLensTableConfig, TableConfig
from dist_moe.data.text import TextConfig
from dist_moe.data.two_images import TwoImagesConfig

DATA = Registry("data set", DataSettings)

for _settings in (MovieLensConfig, TwoImagesConfig, TextConfig, LabelledTextConfig, QuestionsConfig):
    DATA.register(_settings)
for _graph in (NamedGraphConfig, OwnGraphConfig):
    DATA.register(_graph)
for _table in (TableConfig, CensusIncomeConfig, KuaiRandConfig, MovieLensTableConfig):
    DATA.register(_table)

__all__ = [
    "DATA",
    "CensusIncomeConfig",
    "DataSettings",
    "KuaiRandConfig",
    "LabelledTextConfig",
    "MovieLensConfig",
    "MovieLensTableConfig",
    "NamedGraphConfig",
    "OwnGraphConfig",
    "QuestionsConfig",
    "TableConfig",
    "TextConfig",
    "TwoImagesConfig",
]
