"""Tables as plain lines, for pipes, logs and narrow terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return lines of left-aligned columns, the header first; None becomes a dash."""
    cells = [tuple(header), *(tuple("-" if c is None else str(c) for c in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
