"""Two things timed in turn: the ratio of each pair, its median and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def interval_of_median(ratios: Sequence[float]) -> tuple[float, float]:
    """What holds the median of such ratios with 95 % confidence, by order statistics: no shape of
    the noise is assumed."""
    ordered, count = sorted(ratios), len(ratios)
    # The largest rank that leaves at most 2.5 % of a fair coin's throws on either side.
    rank, chance = 0, 0.5**count
    while chance <= 0.025 and rank < count // 2:
        rank += 1
        chance += 0.5**count * math.comb(count, rank)
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[-1 - rank]
