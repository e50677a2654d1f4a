"""*tail* for every fused call, which real sizes get; the cost model would choose for tiny ones."""

from __future__ import annotations

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.selector import Selector
from qlora_compile.kernels.variants.tail import Tail

SPLITS = 8
"""Partial sums of a thin product at real sizes, such as 2048 rows and columns."""


def tail_choice(problem: Problem) -> Choice:
    """*tail* in its first config."""
    variant = Tail()
    return Choice(variant, variant.configs(problem)[0], 0.0)


def choose_tail(selector: Selector) -> None:
    """Makes *tail* the answer for every problem that `selector` was asked for without a record."""
    for problem in selector.take_misses():
        selector.remember(problem, tail_choice(problem))
