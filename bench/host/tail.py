"""Chooses *tail* for every fused call, as for real sizes; for tiny ones the cost model would
not."""

from __future__ import annotations

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.selector import Selector
from qlora_compile.kernels.variants.tail import Tail

SPLITS = 8
"""Partial sums of a thin product at real sizes, such as 2048 rows and columns."""


def tail_choice(problem: Problem) -> Choice:
    """Return *tail* in its first config."""
    variant = Tail()
    return Choice(variant, variant.configs(problem)[0], 0.0)


def choose_tail(selector: Selector) -> None:
    """Make *tail* the answer for every problem that `selector` was asked for without a record."""
    for problem in selector.take_misses():
        selector.remember(problem, tail_choice(problem))
