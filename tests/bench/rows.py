"""Rows made by hand that hold every gate, to be changed by tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.static.figures import Figures
from bench.static.memory import Bound, Traffic
from bench.static.resources import Resources
from bench.static.shipped import Row
from bench.static.utilization import Utilization

Changes = dict[str, Any]

TAKEN = Resources(
    registers=128,
    stack_bytes=0,
    spills=0,
    shared_bytes=32768,
    warps=8,
    loads={128: 8},
    stores={128: 8},
    tensor={"HMMA": 64},
)
USE = Utilization(tensor=0.99, alone=0.8, ctas=2, period=1000.0, iterations=1, overhead=5000.0)
FIGURES = Figures(TAKEN, 2, {"mma": 64}, USE, {"alu": 20.0, "float": 8.0}, None, 0, 1.5)
ROW = Row(
    arch="sm_90",
    kernel="fused_forward",
    format="nf4",
    dtype="bfloat16",
    decoder="shuffle",
    rank=16,
    double_quantized=False,
    config="128x128x64",
    note="",
    tile=(128, 128, 64),
    figures=FIGURES,
)
STREAM = Traffic(1000, 1000, True, {"H100 SXM": Bound(sm_cycles=10.0, dram_cycles=20.0)})


def changed(
    row: Row = ROW,
    *,
    use: Changes | None = None,
    taken: Changes | None = None,
    figures: Changes | None = None,
    **own: Any,
) -> Row:
    """`row` with other values of its own, of its figures, its utilization, its resources."""
    before = row.figures
    assert before is not None
    if use:
        assert before.utilization is not None
        before = dataclasses.replace(
            before, utilization=dataclasses.replace(before.utilization, **use)
        )
    if taken:
        before = dataclasses.replace(
            before, resources=dataclasses.replace(before.resources, **taken)
        )
    return dataclasses.replace(row, figures=dataclasses.replace(before, **(figures or {})), **own)


def full(arch: str = "sm_90") -> list[Row]:
    """Rows that hold every gate on `arch`."""
    rows = [
        changed(arch=arch, kernel=kernel, rank=rank)
        for kernel in ("fused_forward", "fused_backward", "tail_forward", "tail_backward")
        for rank in (0, 16, 64)
    ]
    streams: Changes = {"traffic": STREAM, "utilization": None}
    return [*rows, changed(arch=arch, kernel="dequantize", tile=None, figures=streams)]
