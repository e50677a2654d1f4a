"""Rounds: times candidates in turn, until the time is up and the fastest is known."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

FEWEST_TIMINGS, ENOUGH_TIMINGS, MOST_TIMINGS = 3, 40, 400
WATCHED = 0.1
"""Short candidates are timed ENOUGH_TIMINGS times, and, if the limit allows, for this many seconds
in all: in less time the system's counters do not show other work on the machine."""

_PATIENCE = 3
"""Rounds may take this many times the given seconds, until every candidate has FEWEST_TIMINGS
undisturbed timings."""

_DISTURBED = 2.0
"""A timing is disturbed if it exceeds this many times the least one."""

_WORSE = {2: 2.0, 3: 1.25, 6: 1.0}
"""By number of timings: a candidate is dropped if its best timing exceeds this many times the
median of the fastest candidate. For an equally fast one the best of six timings does so once in 64
cases."""

CONFIDENCE = 0.99
FEWEST_PAIRS = 8
"""The fewest ratios of which an interval can hold the median with CONFIDENCE: 1 - 2 / 2⁸ > 0.99."""


def undisturbed(seconds: Sequence[float]) -> list[float]:
    """Return a candidate's timings without those that other work disturbed.

    Other work only ever adds time: on a busy CPU, many times the time that is measured.
    """
    limit = _DISTURBED * min(seconds)
    return [taken for taken in seconds if taken <= limit]


def usual(seconds: Sequence[float]) -> float:
    """Return the median of a candidate's undisturbed timings."""
    return statistics.median(undisturbed(seconds))


def ratios(seconds: Mapping[int, Sequence[float]], index: int, over: int) -> list[float]:
    """Return how many times as fast candidate `index` was as `over`, in each round of both.

    A candidate's first timing is left out: it belongs to the check, before the rounds.
    """
    pairs = zip(seconds[over][1:], seconds[index][1:], strict=False)
    return [theirs / mine for theirs, mine in pairs]


def interval_of_median(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return an interval that holds the median of such values with `confidence`, or None for too
    few values.

    Order statistics bound it (a sign test inverted), so no shape of the noise is assumed.
    """
    ordered, count = sorted(values), len(values)
    # The largest rank that leaves at most half of the rest of a fair coin's throws on either side.
    rank, chance = 0, 0.5**count
    while chance <= (1 - confidence) / 2:
        rank += 1
        chance += 0.5**count * math.comb(count, rank)
    return (ordered[rank - 1], ordered[-rank]) if rank else None


def run_rounds(
    seconds: dict[int, list[float]],
    time_one: Callable[[int, int], float],
    limit: float,
    clock: Callable[[], float] = time.monotonic,
    watch: float = 0.0,
) -> None:
    """Time the candidates in turn, for about `limit` seconds, and append to their `seconds`.

    The candidates' indices are in the cost model's order; on entry each has its timing of the
    check. time_one: returns the seconds of one run, given a candidate and a round. Clearly slower
    candidates are dropped on the way. The model's choice stays, because the others have to prove
    faster than it; once the time is up, only those go on that may still do so. watch: the fewest
    seconds, within the limit, even if only the model's choice is left.
    """
    alive = list(seconds)
    reference = min(alive, default=-1)
    start = clock()
    if len(alive) < 2:
        return  # With nothing to compare it with, it keeps its one timing.
    for turn in itertools.count(1):
        spent = clock() - start
        done = turn >= MOST_TIMINGS or (turn >= FEWEST_TIMINGS and len(alive) < 2)
        if done and spent >= min(limit, watch):
            break
        if turn >= ENOUGH_TIMINGS and spent > min(limit, WATCHED):
            break
        if turn >= FEWEST_TIMINGS and spent > limit:
            alive = [i for i in alive if i == reference or _undefeated(seconds, i, reference)]
            quiet = all(len(undisturbed(seconds[i])) >= FEWEST_TIMINGS for i in alive)
            known = turn > FEWEST_PAIRS or len(alive) < 2
            if known and (quiet or spent > _PATIENCE * limit):
                break
        # The order rotates, so that no candidate always runs after the same one.
        first = turn % len(alive)
        for index in alive[first:] + alive[:first]:
            seconds[index].append(time_one(index, turn))
        worse = min(factor for least, factor in _WORSE.items() if least <= turn + 1)
        fastest = min(usual(seconds[i]) for i in alive)
        alive = [i for i in alive if i == reference or min(seconds[i]) <= worse * fastest]


def _undefeated(seconds: Mapping[int, Sequence[float]], index: int, reference: int) -> bool:
    """Whether `index` may still prove faster: it has won every round so far, or there have been
    enough rounds to tell."""
    won = ratios(seconds, index, reference)
    return len(won) > FEWEST_PAIRS or all(ratio > 1 for ratio in won)
