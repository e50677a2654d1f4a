"""Thins ranges so that every two compatible values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def pairwise(rows: Sequence[Row], *factors: Callable[[Row], Mapping[str, Hashable]]) -> list[Row]:
    """Return some of `rows`, in their order, such that any values of two factors which a row has
    together are together in one of these, too.

    factors: functions from a row to values by name; only values of the same function are to meet.
    Takes greedily the row with most pairs still wanted, the earliest of equals.
    """
    pairs = [
        {pair for each in factors for pair in itertools.combinations(each(row).items(), 2)}
        for row in rows
    ]
    wanted = set().union(*pairs)
    chosen = set()
    while wanted:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & wanted))
        wanted -= pairs[best]
        chosen.add(best)
    return [rows[i] for i in sorted(chosen)]
