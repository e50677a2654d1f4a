"""CallTimes: times some of the calls on a CPU, to find records that real calls contradict."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice

OFF = 2.0
"""A call contradicts a record that is off by this factor."""

SEVERAL = 5
"""How many timed calls in a row have to contradict a record in the same way."""

_DISTANCES = range(11, 24)
"""The number of calls from a timed one to the next, drawn anew each time: with a fixed distance the
same layers would be timed in every step of a multiple of so many calls."""


@dataclass(frozen=True)
class Contradiction:
    """A choice whose recorded seconds real calls contradict. factor: how many times as long as
    recorded the last of these calls took, less than 1 if it was faster."""

    choice: Choice
    factor: float


class Countdown:
    """Says which calls are due, one of several."""

    def __init__(self) -> None:
        self._calls = 0
        self._random = random.Random(0)
        self._next = self._random.choice(_DISTANCES)

    def is_due(self) -> bool:
        """Count a call, and return whether it is due."""
        self._calls += 1
        if self._calls < self._next:
            return False
        self._next = self._calls + self._random.choice(_DISTANCES)
        return True


class _Chosen(threading.local):
    chosen = False


_current = _Chosen()


@contextlib.contextmanager
def due() -> Iterator[None]:
    """Have the calls of this thread timed inside the context."""
    before, _current.chosen = _current.chosen, True
    try:
        yield
    finally:
        _current.chosen = before


class CallTimes:
    """The times of some calls beside the recorded ones.

    Counting a call costs about 0.4 µs, timing it about 2 µs.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.contradictions: dict[Problem, Contradiction] = {}
        self._clock = clock
        self._countdown = Countdown()
        self._in_a_row: dict[Problem, tuple[Choice, int]] = {}

    def is_due(self) -> bool:
        """Count a call, and return whether to time it."""
        return _current.chosen or self._countdown.is_due()

    @contextlib.contextmanager
    def timing(self, problem: Problem, choice: Choice, rows: int) -> Iterator[None]:
        """Time the body, a call of `choice` for `problem` with `rows` rows, and compare."""
        start = self._clock()
        yield
        if choice.measured is not None:
            self._compare(problem, choice, rows, self._clock() - start)

    def _compare(self, problem: Problem, choice: Choice, rows: int, seconds: float) -> None:
        # The record is of the bucket's rows. With fewer a call is faster, at most in proportion.
        least = choice.seconds * rows / problem.m
        contradicted = 0
        if seconds > OFF * choice.seconds:
            contradicted = 1
        elif seconds * OFF < least:
            contradicted = -1
        known, count = self._in_a_row.get(problem, (choice, 0))
        # In the same way as before, and about the same choice; otherwise begin anew.
        if known is not choice or count * contradicted < 0 or not contradicted:
            count = 0
        count += contradicted
        if abs(count) == SEVERAL:
            factor = seconds / (choice.seconds if count > 0 else least)
            self.contradictions[problem] = Contradiction(choice, factor)
            count = 0
        self._in_a_row[problem] = choice, count
