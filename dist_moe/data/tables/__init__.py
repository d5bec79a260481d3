"""Tables of categories, numbers and lists with any number of targets: the user's own, and named ones.

All are prepared by `TableSettings.prepare`. `TableConfig` and `prepare_own_table` read CSV and Parquet by a
`TableSchema`; a named source gives its schema and its files to `prepare_table`.
"""

from dist_moe.data.tables.census_income import CensusIncomeConfig
from dist_moe.data.tables.columns import TableColumns, Target
from dist_moe.data.tables.kuairand import KuaiRandConfig
from dist_moe.data.tables.movielens import MovieLensTableConfig
from dist_moe.data.tables.own import TableConfig, prepare_own_table
from dist_moe.data.tables.prepare import PreparedTable, TableSettings, TableSource, prepare_table
from dist_moe.data.tables.rows import RowBatch, RowTable

__all__ = [
    "CensusIncomeConfig",
    "KuaiRandConfig",
    "MovieLensTableConfig",
    "PreparedTable",
    "RowBatch",
    "RowTable",
    "TableColumns",
    "TableConfig",
    "TableSettings",
    "TableSource",
    "Target",
    "prepare_own_table",
    "prepare_table",
]
