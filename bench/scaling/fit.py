"""A power law through points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """y = factor * x ** exponent. error: the exponent's standard error. off: the largest factor
    between a point and the law, at least 1. last: the exponent from the last two points alone."""

    exponent: float
    error: float
    factor: float
    off: float
    last: float

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """Fit by least squares of log y over log x: at least three points, all positive, x
    ascending."""
    if len(xs) < 3:
        raise ValueError(f"a law and its error need three points, not {len(xs)}")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    residuals = [y - slope * x - intercept for x, y in zip(log_x, log_y, strict=True)]
    mean = statistics.mean(log_x)
    spread = sum((x - mean) ** 2 for x in log_x)
    error = math.sqrt(sum(r * r for r in residuals) / (len(xs) - 2) / spread)
    off = math.exp(max(abs(r) for r in residuals))
    last = (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])
    return Fit(slope, error, math.exp(intercept), off, last)


def two_digits(exponent: float) -> str:
    """Return the number with two digits, and no sign before a zero."""
    return f"{round(exponent, 2) + 0.0:.2f}"
