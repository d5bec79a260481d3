"""A signal that reaches one rank at a chosen step of a run."""

from __future__ import annotations

import os

from dist_moe.engine import training as loop
from tests.helpers.commands import Outcome, run_here


def signalled(number: int, at_step: int, at_rank: int, arguments: list[str]) -> Outcome:
    """Run the command line; one rank gets a signal as it begins a step (counted from 1)."""
    seed_step = loop.seed_step

    def seed_and_signal(seed: int, step: int, rank: int) -> None:
        seed_step(seed, step, rank)
        if (step + 1, rank) == (at_step, at_rank):
            os.kill(os.getpid(), number)

    loop.seed_step = seed_and_signal
    try:
        return run_here(arguments)
    finally:
        loop.seed_step = seed_step
