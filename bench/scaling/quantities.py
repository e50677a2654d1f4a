"""Quantities of one contender's run, to be fitted over an axis."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.peers.race import Run


@dataclass(frozen=True)
class Quantity:
    """One quantity. of: returns its value, in `unit`, from a run that did not fail."""

    name: str
    unit: str
    of: Callable[[Run], float]


def _step(run: Run) -> float:
    return statistics.median(run.seconds)


STEP = Quantity("step time", "s", _step)
PEAK = Quantity("peak memory", "MB", lambda run: run.peak / 1e6)
SAVED = Quantity("saved memory", "MB", lambda run: run.saved / 1e6)
FIRST = Quantity("first step beyond a step", "s", lambda run: run.first - _step(run))
TUNE = Quantity("optimise + tune time", "s", lambda run: run.build + run.first - _step(run))
