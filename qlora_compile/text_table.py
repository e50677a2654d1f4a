"""Tables as plain lines: what a pipe, a log and a narrow terminal can all take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of left-aligned columns, the header first; None is a dash."""
    cells = [tuple(header), *(tuple("-" if c is None else str(c) for c in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
