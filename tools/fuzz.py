"""Is every odd input refused with a sentence, or read rightly? Thousands of them, drawn by seeds.

    python tools/fuzz.py --minutes 30 --seed 0
    python tools/fuzz.py --areas data hugging_face --cases 500
    python tools/fuzz.py --seed 0 --case data:123

Each case is odd input to an entry of the product: files, values, environment variables. It must end as a `UserError`
whose message can be read, or be accepted and be what an independent, naive reading of the same input says. Counted as
faults are exceptions of any other kind, cases that take more than 10 seconds, wrong readings, and whatever changes a
file of the user's. A case depends on its seed, area and number alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tools.fuzzing.areas import AREAS  # noqa: E402
from tools.fuzzing.case import FAULTS, VERDICTS, Area, Outcome  # noqa: E402
from tools.fuzzing.pool import LIMIT_S, Worker  # noqa: E402

HEADINGS = {
    "refused": "refused with a sentence",
    "accepted": "accepted and right",
    "traceback": "tracebacks",
    "hang": f"hangs (> {LIMIT_S:g} s)",
    "wrong": "silently wrong",
    "touched": "user's files touched",
}


@dataclass
class Tally:
    """The outcomes of the cases of one area. ``faults``: numbers of those that are faults, with what came of them."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, Outcome]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, number: int, outcome: Outcome, seconds: float) -> None:
        """Count a case."""
        self.counts[outcome.verdict] += 1
        self.seconds += seconds
        if outcome.verdict in FAULTS:
            self.faults.append((number, outcome))


def fuzz(
    areas: Sequence[Area],
    seed: int,
    scratch: Path,
    *,
    minutes: float,
    cases: int | None = None,
    first: int = 0,
    limit_s: float = LIMIT_S,
) -> dict[str, Tally]:
    """Try cases of all areas, each for as long as the others, and return what came of them by area.

    ``minutes``: how long, once all is imported. ``cases``: at most so many of each area, from ``first``.
    """
    tallies = {area.name: Tally() for area in areas}
    numbers = dict.fromkeys(tallies, first)
    with ExitStack() as stack:
        workers = {a.name: stack.enter_context(Worker(a, seed, scratch / "place" / a.name, limit_s)) for a in areas}
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            waiting = [name for name in tallies if cases is None or numbers[name] < first + cases]
            if not waiting:
                break
            name = min(waiting, key=lambda name: tallies[name].seconds)
            begin = time.monotonic()
            outcome = workers[name].attempt(numbers[name])
            tallies[name].add(numbers[name], outcome, time.monotonic() - begin)
            numbers[name] += 1
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Return the counts of all areas as a table."""
    rows = [["area", "tried", *HEADINGS.values()]]
    rows += [[n, t.counts.total(), *(t.counts[v] for v in VERDICTS)] for n, t in tallies.items()]  # type: ignore[list-item]
    whole: Counter[str] = sum((tally.counts for tally in tallies.values()), Counter())
    rows.append(["**all**", whole.total(), *(whole[v] for v in VERDICTS)])  # type: ignore[list-item]
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def prepared(names: Iterable[str], scratch: Path) -> list[Area]:
    """Return areas by name, with what their cases begin with in ``scratch``."""
    areas = [AREAS[name](scratch / "base" / name) for name in names]
    for area in areas:
        area.base.mkdir(parents=True)
        area.prepare()
    return areas


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, try, print; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--cases", type=int, help="at most so many of each area")
    parser.add_argument("--case", metavar="AREA:NUMBER", help="one case alone, and all that came of it")
    options = parser.parse_args(arguments)
    first, cases, names = 0, options.cases, options.areas
    if options.case is not None:
        area, _, number = options.case.partition(":")
        if area not in AREAS or not number.isdecimal():
            parser.error(f"--case {options.case}: expected AREA:NUMBER, AREA one of {', '.join(AREAS)}")
        first, cases, names = int(number), 1, [area]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        areas = prepared(names, Path(scratch))
        tallies = fuzz(areas, options.seed, Path(scratch), minutes=options.minutes, cases=cases, first=first)
    for name, tally in tallies.items():
        for number, outcome in tally.faults:
            print(
                f"--seed {options.seed} --case {name}:{number}  {outcome.verdict}: {outcome.what}\n{outcome.detail}\n"
            )
        if options.case is not None and not tally.faults:
            print(f"{name}:{first}: {dict(tally.counts)}")
    print(f"`python tools/fuzz.py --minutes {options.minutes:g} --seed {options.seed}`\n\n{table(tallies)}")
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
