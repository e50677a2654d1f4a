"""Shapes: parses the value of --shapes."""

from __future__ import annotations

from qlora_compile.cli.errors import ShapeError

Shape = tuple[int, tuple[int, ...], int, int]
"""(M, N of each Linear that shares the input, K, rank)."""


def parse_shapes(text: str) -> list[Shape]:
    """Parse a list such as "4096x4096+1024+1024x4096x16,512x1024x4096x0"; rank 0 means no adapter.

    Raises:
        ShapeError: an item is not four whole numbers, or a dimension is zero.
    """
    return [_shape(item.strip()) for item in text.split(",")]


def _shape(item: str) -> Shape:
    dimensions = [part.split("+") for part in item.lower().split("x")]
    numbers = [number for part in dimensions for number in part]
    # int() would also take "1_000", "+4" and digits of other scripts.
    plain = all(n.isascii() and n.isdigit() for n in numbers)
    siblings = [i for i, part in enumerate(dimensions) if len(part) > 1]
    if not plain or len(dimensions) != 4 or siblings not in ([], [1]):
        raise ShapeError(value=item, problem="is not four whole numbers")
    m, n, k, rank = ([int(number) for number in part] for part in dimensions)
    if not all((*m, *n, *k)):
        raise ShapeError(value=item, problem="has a dimension of zero")
    return m[0], tuple(n), k[0], rank[0]
