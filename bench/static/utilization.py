"""Modelled use of the tensor cores by a kernel's main loop, and the modelled time of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.static.flow import Path
from bench.static.mix import TENSOR, instruction_class, macs
from bench.static.sass import Instruction
from bench.static.sm_model import ITERATIONS, simulate
from bench.static.sm_table import MULTIPROCESSORS

MODELLED_CTAS = 4
"""More CTAs than this change the period per CTA no further, and cost time to simulate."""


class LoopError(ValueError):
    """The main loop found does not do the multiplications that the kernel's tile says."""


@dataclass(frozen=True)
class Utilization:
    """All *modelled*. tensor: share of the tensor cores' peak in the steady main loop, with `ctas`
    CTAs on the SM; alone: with one. period: cycles of one iteration of all `ctas`; iterations: of
    the tile's K loop that one pass of the machine loop does. overhead: cycles of a CTA's start and
    end that no iteration accounts for, with `ctas` side by side."""

    tensor: float
    alone: float
    ctas: int
    period: float
    iterations: int
    overhead: float

    def cycles(self, iterations: int) -> float:
        """Of one wave of `ctas` CTAs whose K loops have `iterations` iterations."""
        return self.overhead + self.period * iterations / self.iterations


def loop_macs(path: Path, warps: int) -> int:
    """Multiply-accumulates of one pass of the loop, of one CTA."""
    return sum(macs(instruction, warps) for instruction in path.loop)


def tensor_weight(code: Sequence[Instruction]) -> tuple[int, int]:
    """For `flow.path`: the main loop is the one with most tensor-core work, then the longest."""
    multiplying = [i for i in code if instruction_class(i.opcode) in TENSOR]
    return sum(macs(i, 4) for i in multiplying) or len(multiplying), len(code)


def tensor_utilization(
    path: Path, arch: str, *, warps: int, ctas: int, macs_per_iteration: int
) -> Utilization | None:
    """None where `arch` has no model of its tensor cores (sm_100), and for a loop without them.

    macs_per_iteration: BM·BN·BK. ctas: that fit on the SM. Raises LoopError if the loop multiplies
    other than a whole number of such tiles.
    """
    sm = MULTIPROCESSORS[arch]
    done = loop_macs(path, warps)
    if not sm.macs_per_cycle or not done:
        return None
    if done % macs_per_iteration:
        raise LoopError(
            f"the main loop does {done} multiply-accumulates, the tile has {macs_per_iteration}"
        )
    resident = max(1, min(ctas, MODELLED_CTAS))
    alone = simulate(path, sm, warps=warps, ctas=1)
    timeline = alone
    if resident > 1:
        timeline = simulate(path, sm, warps=warps, ctas=resident)
    ideal = done / sm.macs_per_cycle
    return Utilization(
        tensor=ideal * resident / timeline.period,
        alone=ideal / alone.period,
        ctas=resident,
        period=timeline.period,
        iterations=done // macs_per_iteration,
        overhead=timeline.total - ITERATIONS * timeline.period,
    )
