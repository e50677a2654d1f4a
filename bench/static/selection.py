"""Which of the shipped launches stand for a kernel when kernels are compared."""

from __future__ import annotations

from collections.abc import Sequence

from bench.static.shipped import Row
from bench.static.sm_table import Card

REDUCTION = 4096
"""K of the layer for which the modelled time of a whole kernel is stated."""
SMALLEST_M_TILE = 128
STORED_BYTES = {"nf4": 0.5625, "fp4": 0.5625, "int8": 1.0625}
"""Per weight, a float32 absmax per 64 included; other weights are stored in x's dtype."""


def candidates(
    rows: Sequence[Row], kernel: str, *, double_quantized: bool | None = None
) -> list[Row]:
    """The usual launches of `kernel` with an adapter, in bfloat16: NF4 where it decodes, BM at
    least SMALLEST_M_TILE.

    rows: of one architecture. double_quantized: None for either.
    """
    return [
        row
        for row in rows
        if _comparable(row, kernel, double_quantized)
        and row.rank > 0
        and row.tile is not None
        and row.tile[0] >= SMALLEST_M_TILE
    ]


def best(rows: Sequence[Row], kernel: str, *, double_quantized: bool | None = None) -> Row | None:
    """The candidate that uses the tensor cores most; None if there is none."""
    found = candidates(rows, kernel, double_quantized=double_quantized)
    return max(found, key=_utilization, default=None)


def fastest(
    rows: Sequence[Row], kernel: str, rank: int, *, double_quantized: bool = False
) -> Row | None:
    """The usual launch of `kernel` at `rank` with the least modelled time per output element;
    None if there is none. rows: of one architecture."""
    found = [row for row in rows if _comparable(row, kernel, double_quantized) and row.rank == rank]
    return min(found, key=output_cycles, default=None)


def output_cycles(row: Row) -> float:
    """Modelled cycles of an SM per element of the output: a CTA's start, REDUCTION / BR iterations
    and its end, over the CTAs side by side and over BM·BC.

    row: with a tile and a modelled utilization.
    """
    assert row.figures is not None
    assert row.tile is not None
    use = row.figures.utilization
    assert use is not None
    bm, bc, br = row.tile
    return use.cycles(-(-REDUCTION // br)) / use.ctas / (bm * bc)


def l2_need(row: Row, card: Card) -> float:
    """Bytes per second that `card` would have to read from its second-level cache to keep the
    modelled pace on all SMs: each CTA its tiles of x and of W, as stored, in every iteration.

    row: with a tile and a modelled utilization.
    """
    assert row.figures is not None
    assert row.tile is not None
    use = row.figures.utilization
    assert use is not None
    bm, bc, br = row.tile
    activation = 4.0 if row.dtype == "float32" else 2.0
    weight = STORED_BYTES.get(row.format, activation)
    tiles = br * (bm * activation + bc * weight) * use.iterations * use.ctas
    return tiles / use.period * card.sms * card.clock


def _comparable(row: Row, kernel: str, double_quantized: bool | None) -> bool:
    return (
        row.kernel == kernel
        and row.dtype == "bfloat16"
        and row.format in ("", "dense", "nf4")
        and not row.note
        and row.tile is not None
        and row.figures is not None
        and row.figures.utilization is not None
        and double_quantized in (None, row.double_quantized)
    )


def _utilization(row: Row) -> float:
    return row.figures.utilization.tensor if row.figures and row.figures.utilization else 0.0
