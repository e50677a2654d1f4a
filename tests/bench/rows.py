"""Rows made by hand that meet every gate, for tests to change."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.static.figures import Figures
from bench.static.memory import Traffic
from bench.static.resources import Resources
from bench.static.shipped import Row

TAKEN = Resources(
    registers=128,
    stack_bytes=0,
    spills=0,
    shared_bytes=32768,
    warps=8,
    loads={128: 8},
    stores={128: 8},
    tensor={"HMMA": 64},
    mix={"mma": 64, "alu": 192, "shuffle": 2},
)
PRODUCT = Row("sm_90", "tail_forward", "tail_forward usual", True, Figures(TAKEN, 2, None))
STREAM = Traffic(1000, 1000, wide=True)


def changed(row: Row = PRODUCT, *, ctas: int = 2, traffic: Any = ..., **taken: Any) -> Row:
    """Return `row` as "bad", with other figures."""
    assert row.figures is not None
    figures = dataclasses.replace(
        row.figures,
        resources=dataclasses.replace(row.figures.resources, **taken),
        ctas=ctas,
        traffic=row.figures.traffic if traffic is ... else traffic,
    )
    return dataclasses.replace(row, name=f"{row.kernel} bad", figures=figures)


def stream(arch: str = "sm_90") -> Row:
    figures = Figures(dataclasses.replace(TAKEN, tensor={}), 2, STREAM)
    return Row(arch, "dequantize", "dequantize usual", False, figures)


def full(arch: str = "sm_90") -> list[Row]:
    """Return rows that meet every gate on `arch`."""
    return [dataclasses.replace(PRODUCT, arch=arch), stream(arch)]
