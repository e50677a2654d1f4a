"""Caution: how much other work, noise and contradiction a measurement may show and still count."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Caution:
    """The limits beyond which a measurement does not count.

    others, stolen, preemptions, spread, drift: the largest values of these fields of `Load`;
    preemptions say little, and matter only where the system does not report `others`. surprise: a
    gain over the standard *dense* is measured twice if the cost model would have to be wrong by
    more than this factor. reversal: the same for the gain over the cost model's own choice. runs:
    how often one problem is measured at most until a measurement counts.
    """

    others: float = 0.25
    stolen: float = 0.05
    preemptions: float = 100.0
    spread: float = 0.5
    drift: float = 1.5
    surprise: float = 3.0
    reversal: float = 2.0
    runs: int = 4


CAREFUL = Caution()

TRUSTING = Caution(*[math.inf] * 7, runs=1)
"""No limits: every measurement counts, for a machine whose load does not matter."""
