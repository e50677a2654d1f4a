"""Holds rows out of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_compile.errors import TooLittleTextError

MOST = 64
"""Rows held out at most: enough for a small standard error, few enough to evaluate in a moment."""


def with_held_out(rows: Any, fraction: float, seed: int) -> Any:
    """Return the TrainingRows with a part of them held out, or with their own held-out split cut to
    the same number; a stream without such a split stays as it is.

    fraction: the part of the rows to hold out, at least one row unless it is 0. The same seed draws
    the same rows.

    Raises:
        TooLittleTextError: holding out would leave nothing to train on.
    """
    if fraction == 0:
        return replace(rows, held_out=None)
    if rows.held_out is not None:
        own = rows.held_out
        few = getattr(own, "num_rows", 0) > MOST
        return replace(rows, held_out=own.shuffle(seed=seed).select(range(MOST)) if few else own)
    count = getattr(rows.table, "num_rows", None)
    if count is None:
        return rows
    chosen = min(MOST, max(1, round(count * fraction)))
    if chosen >= count:
        raise TooLittleTextError(
            value=rows.origin.name,
            count=count,
            unit="rows",
            purpose="training and held-out rows together",
            needed=f"{chosen + 1} or more",
            option="--held-out (0 for none)",
        )
    parts = rows.table.train_test_split(test_size=chosen, seed=seed)
    return replace(rows, table=parts["train"], held_out=parts["test"])
