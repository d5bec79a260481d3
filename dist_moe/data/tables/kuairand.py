"""KuaiRand (Gao et al., CIKM 2022, arXiv:2208.08696; CC BY-SA 4.0): what users of Kuaishou did with short videos.

No package carries it. KuaiRand-Pure (1.4 million standard and 1.2 million random exposures) and KuaiRand-1K (11.7
million standard ones) are at https://zenodo.org/records/10439422, described at https://kuairand.com. The directory
``data`` of either holds, the version at the end of each name: logs of two fortnights ``log_standard_*.csv`` and of
videos that were put in at random ``log_random_*.csv``, ``user_features_*.csv`` and ``video_features_basic_*.csv``.

A row is a video that a user was shown; targets are six of the user's responses. Inputs are user, video, scenario
(``tab``), hour and length, and the columns of the two tables of features. Not among them is what was known only
afterwards: time played, other responses, ``visible_status``, and ``video_features_statistic_*.csv``, which sums up the
responses of the whole month, those to be predicted too.

Rows are split by date: until 21 April 2022 (the first fortnight) to train, until 28 April to validate, until 8 May to
test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData
from dist_moe.data.tables.files import CsvFile
from dist_moe.data.tables.prepare import PreparedTable, TableSettings, TableSource, prepare_table
from dist_moe.data.tables.schema import (
    BinaryTarget,
    CategoricalColumn,
    FeatureColumn,
    ListColumn,
    NumericColumn,
    Split,
    TableSchema,
)
from dist_moe.data.tables.widened import JoinedFile, read_lookup

Response = Literal["is_click", "long_view", "is_like", "is_comment", "is_forward", "is_follow"]

STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
RANDOM = "log_random_4_22_to_5_08"
FEATURES = ("user_features", "video_features_basic")
VERSIONS = ("pure", "1k")

_RANGES = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
"""Numbers of a user that stand there a second time, cut into ranges."""

LOG = ("user_id", "video_id", "tab", "hourmin", "duration_ms")
USER = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", *_RANGES),
    *(f"{name}_range" for name in _RANGES),
    *(f"onehot_feat{place}" for place in range(18)),
)
VIDEO = (
    *("author_id", "video_type", "upload_dt", "upload_type", "video_duration", "server_width", "server_height"),
    *("music_id", "music_type", "tag"),
)
NUMERIC = ("duration_ms", *_RANGES, "video_duration", "server_width", "server_height")
SPLIT = Split(
    column="date",
    values={
        "train": tuple(range(20220408, 20220422)),
        "val": tuple(range(20220422, 20220429)),
        "test": (20220429, 20220430, *range(20220501, 20220509)),
    },
)


def _kind(name: str) -> FeatureColumn:
    if name == "tag":
        return ListColumn(type="list", separator=",")
    return NumericColumn(type="numeric") if name in NUMERIC else CategoricalColumn(type="categorical")


def published(logs: tuple[str, ...]) -> PublishedData[list[File]]:
    """Return the data set with these of its logs, which a directory of the user holds."""
    stems = (*FEATURES, *logs)
    return PublishedData(
        title="KuaiRand",
        files=tuple(tuple(f"{stem}_{version}.csv" for version in VERSIONS) for stem in stems),
        read=lambda files, progress: files,
        folders=("data", "KuaiRand-Pure/data", "KuaiRand-1K/data"),
        remedy="get KuaiRand-Pure or KuaiRand-1K from https://zenodo.org/records/10439422, unpack it, and give its "
        f"directory data, which holds {stems[-1]}_pure.csv or {stems[-1]}_1k.csv (--data-root DIR or data.root=DIR).",
    )


class KuaiRandConfig(TableSettings):
    """KuaiRand-Pure or KuaiRand-1K: responses of users to videos that they were shown."""

    name: Literal["kuairand"] = "kuairand"
    root: Path | None = Field(
        default=None, description="The directory data of KuaiRand-Pure or KuaiRand-1K; needed, no package carries it."
    )
    targets: tuple[Response, ...] = Field(default=get_args(Response), min_length=1, description="Responses to predict.")
    random_exposure: bool = Field(
        default=False, description="Read the log of videos that were shown at random as well; it begins on 22 April."
    )

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Response, ...]) -> tuple[Response, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("a target is named twice; leave each once")
        return targets

    @property
    def table_schema(self) -> TableSchema:
        """Which columns are features, targets, group and part."""
        columns = {name: _kind(name) for name in (*LOG, *USER, *VIDEO)}
        return TableSchema(
            columns=columns,
            targets=dict.fromkeys(self.targets, BinaryTarget(type="binary")),
            group="user_id",
            split=SPLIT,
        )

    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, prepared once for each directory and choice; see `TableSettings.prepare`."""
        located = published((*STANDARD, *([RANDOM] if self.random_exposure else []))).locate(self.root)

        def locate(downloads: Path, report: Progress) -> TableSource:
            assert located.root is not None
            users, videos, *logs = (CsvFile(located.root / name) for name in located.files)
            lookups = (read_lookup(users, "user_id", USER), read_lookup(videos, "video_id", VIDEO))
            source = {"name": "directory", "sha256": located.files}
            return TableSource({"train": [JoinedFile(log, lookups) for log in logs]}, source)

        return prepare_table(self, self.table_schema, located.key, locate, Progress(progress))
