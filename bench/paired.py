"""Two things timed in turn: the ratio of each pair, its median and the median's uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_compile.tuning import rounds


def interval_of_median(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the interval that holds the median of such ratios with 95 % confidence; for too few
    ratios, the interval of all."""
    return rounds.interval_of_median(ratios, 0.95) or (min(ratios), max(ratios))
