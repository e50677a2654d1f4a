"""Shapes as the command line takes them."""

from __future__ import annotations

from qlora_compile.errors import ShapeError


def parse_shapes(text: str) -> list[tuple[int, int, int, int]]:
    """(M, N, K, rank) of every item of "4096x4096x4096x16,512x1024x4096x0"; rank 0: no adapter.

    Raises:
        ShapeError: an item is not four whole numbers, or a dimension is zero.
    """
    return [_shape(item.strip()) for item in text.split(",")]


def _shape(item: str) -> tuple[int, int, int, int]:
    numbers = item.lower().split("x")
    # int() would also take "1_000", "+4" and digits of other scripts.
    if len(numbers) != 4 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise ShapeError(value=item, problem="is not four whole numbers")
    m, n, k, rank = map(int, numbers)
    if not all((m, n, k)):
        raise ShapeError(value=item, problem="has a dimension of zero")
    return m, n, k, rank
