"""One try: odd input in a directory of a user's, what the product does with it, and what it should have done."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import stat
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from dist_moe.cli.main import main
from dist_moe.errors import UserError

Must = Literal["accept", "refuse"] | None
Verdict = Literal["refused", "accepted", "traceback", "hang", "wrong", "touched"]
VERDICTS: tuple[Verdict, ...] = ("refused", "accepted", "traceback", "hang", "wrong", "touched")
FAULTS = VERDICTS[2:]

LONGEST_REFUSAL = 6_000
"""Characters of a message that a person can still read."""


@dataclass(frozen=True)
class Case:
    """``what``: was done to the input, for a person. ``run``: the product's own entry. ``check``: what is wrong with
    what it gave, by an independent reading; None if nothing. ``must``: where only one answer is right."""

    what: str
    run: Callable[[], Any]
    check: Callable[[Any], str | None] = lambda result: None
    must: Must = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case."""

    verdict: Verdict
    what: str
    detail: str = ""


@dataclass
class Area(ABC):
    """A kind of input. ``base``: a directory that is made once by `prepare`, and read by all cases."""

    name: ClassVar[str]
    base: Path
    kept: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def prepare(self) -> None:
        """Make what all cases begin with in ``base``; runs once, in the parent."""

    @abstractmethod
    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Return the case that ``drawn`` decides, after its files are written.

        ``user``: an empty directory for what is the user's, which nobody may change; ``ours``: for all else.
        """


def command(*arguments: object) -> str:
    """Return what ``dist-moe ARGUMENTS`` prints; raise UserError with its message where it ends with code 2."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    if code == 2:
        raise UserError(err.getvalue())
    if code:
        raise AssertionError(f"exit code {code}: {err.getvalue()}")
    return out.getvalue()


def attempt(area: Area, seed: int, number: int, place: Path) -> Outcome:
    """Try case ``number`` of an area in the directory ``place``, which is emptied first."""
    drawn = random.Random(f"{seed} {area.name} {number}")
    shutil.rmtree(place, ignore_errors=True)
    user, ours = place / "user", place / "ours"
    user.mkdir(parents=True)
    ours.mkdir()
    case = area.case(drawn, user, ours)
    before = snapshot(user)
    outcome = _outcome(case)
    changed = sorted(name for name, _ in before.items() ^ snapshot(user).items())
    if changed:
        return Outcome("touched", case.what, f"changed, made or removed: {', '.join(changed[:5])}")
    return outcome


def _outcome(case: Case) -> Outcome:
    try:
        result = case.run()
    except UserError as refusal:
        message = str(refusal).strip()
        if case.must == "accept":
            return Outcome("wrong", case.what, f"refused, and is right: {message[:500]}")
        if not message or len(message) > LONGEST_REFUSAL or "Traceback (most recent" in message:
            return Outcome("traceback", case.what, f"a refusal that says nothing, or too much: {message[:500]}")
        return Outcome("refused", case.what, message[:300])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("traceback", case.what, "".join(traceback.format_exception(error))[-1800:])
    if case.must == "refuse":
        return Outcome("wrong", case.what, "accepted, and cannot be right")
    try:
        complaint = case.check(result)
    except Exception as error:
        complaint = f"an independent reading fails: {''.join(traceback.format_exception(error))[-700:]}"
    return Outcome("wrong" if complaint else "accepted", case.what, complaint or "")


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """Return kind, size, time of change and SHA-256 of everything below a directory, by its path."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder) / name
            about = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(about.st_mode) else ""
            time = 0 if stat.S_ISDIR(about.st_mode) else about.st_mtime_ns
            size = 0 if stat.S_ISDIR(about.st_mode) else about.st_size
            found[str(path.relative_to(directory))] = (about.st_mode, size, time, content)
    return found
