"""Which ranks hold up the others, from all ranks' signs of life. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_moe.engine.health.heartbeats import Heartbeat


@dataclass(frozen=True)
class Sighting:
    """``last``: the rank's newest heartbeat, None if it never wrote one. ``silent_s``: seconds by the
    reader's clock since it last wrote."""

    rank: int
    last: Heartbeat | None
    silent_s: float


@dataclass(frozen=True)
class Verdict:
    """``ranks`` that hold up the job; empty if some rank still makes progress. ``why``: in words.
    ``frozen``: whether they cannot end by themselves."""

    ranks: tuple[int, ...]
    why: str
    frozen: bool = False


def judge(sightings: Sequence[Sighting], stall_s: float) -> Verdict:
    """Who stalls, asked by a rank that has made no progress for ``stall_s`` seconds.

    A rank without a sign of life is to blame before all others; then one that makes no progress outside
    of any collective, and of several the one that has issued the fewest collectives (the others may wait
    for its part on a device); then, where all wait in collectives, those that have come to the fewest.
    """
    present = [one for one in sightings if one.last is None or not one.last.ended]
    frozen = [one.rank for one in present if one.last is None or one.silent_s >= stall_s / 3]
    if frozen:
        return Verdict(tuple(frozen), "no sign of life", frozen=True)
    beats = [one.last for one in present if one.last is not None]
    if any(beat.idle_s + one.silent_s < stall_s / 2 for one, beat in zip(present, beats, strict=True)):
        return Verdict((), "some rank makes progress")
    outside = [beat for beat in beats if not beat.collective]
    if outside:
        return Verdict(_behind(outside), "no progress, and not in a collective")
    behind = _behind(beats)
    if len(behind) == len(beats):
        return Verdict(behind, "all ranks wait in the same collective: look at the network between them")
    return Verdict(behind, "waits in an earlier collective than the others")


def _behind(beats: Sequence[Heartbeat]) -> tuple[int, ...]:
    fewest = min(beat.collectives for beat in beats)
    return tuple(beat.rank for beat in beats if beat.collectives == fewest)


def report(verdict: Verdict, sightings: Sequence[Sighting], exit_code: int) -> str:
    """What the user gets to read: who, where, what every rank did, and the culprits' Python stacks."""
    named = ", ".join(f"rank {rank}" for rank in verdict.ranks)
    step = max(
        (one.last.step for one in sightings if one.last), default=0
    )  # of the job; a frozen rank tells an old one
    lines = [f"{named} stalled at step {step} ({verdict.why}); the job ends with exit code {exit_code}"]
    lines += [_line(one, one.rank in verdict.ranks) for one in sightings]
    for one in sightings:
        if one.rank in verdict.ranks and one.last:
            process = one.last.process
            lines.append(
                f"stack of rank {one.rank}, pid {process.pid} on {process.machine.split()[0]}, innermost last:"
            )
            lines.append(one.last.stack.rstrip())
    return "\n".join(lines)


def _line(one: Sighting, stalled: bool) -> str:
    if one.last is None:
        return f"  rank {one.rank}: never gave a sign of life"
    beat = one.last
    waiting = f", in {beat.collective}" if beat.collective else ""
    state = beat.process.state() if stalled else ""
    silent = f", silent for {one.silent_s:.0f} s" if one.silent_s > 1 and stalled else ""
    mark = "  <- stalled" if stalled else ""
    return (
        f"  rank {one.rank}: step {beat.step}, {beat.phase}{waiting}, no progress for "
        f"{beat.idle_s + one.silent_s:.0f} s{silent}{f', process {state}' if state else ''}{mark}"
    )
