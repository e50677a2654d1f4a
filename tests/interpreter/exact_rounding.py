"""Rounding of exact fractions to binary floating point, as a reference for tests."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple


class FloatFormat(NamedTuple):
    digits: int  # binary, the leading one included
    lowest: int  # exponent of the smallest subnormal number
    overflow: int  # the exponent from which on results are infinite


FLOAT32 = FloatFormat(24, -149, 128)
FLOAT16 = FloatFormat(11, -24, 16)
BFLOAT16 = FloatFormat(8, -133, 128)


def nearest(value: Fraction, target: FloatFormat) -> float:
    """Return the number of the format nearest to `value`, ties to even; zero comes out as +0."""
    magnitude = abs(value)
    if not magnitude:
        return 0.0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - target.digits + 1, target.lowest)
    rounded = round(magnitude / unit) * unit
    result = math.inf if rounded >= Fraction(2) ** target.overflow else float(rounded)
    return math.copysign(result, value)
