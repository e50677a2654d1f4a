"""Gates: the conditions on the binaries of all shipped launches, and whether they are met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.static.figures import Figures
from bench.static.resources import WIDE
from bench.static.shipped import STREAMS, Row
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS

EXCESS = 0.01
"""How far the bytes moved may be from those of all tensors, as a part of the latter."""


@dataclass(frozen=True)
class Gate:
    """One condition. problem: returns what is wrong with a compiled launch, or ""; None for a gate
    that a launch compiles. kernels: those it applies to; empty for every kernel."""

    name: str
    problem: Callable[[Row, Figures], str] | None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The result of a gate on an architecture. launches: how many were judged, at least one.
    problems: by the launch's name."""

    gate: str
    arch: str
    launches: int
    problems: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.launches > 0 and not self.problems


def evaluate(
    rows: Sequence[Row], archs: Sequence[str], kernels: Sequence[str] | None
) -> list[Result]:
    """Judge every gate of `archs` whose kernels are all among `kernels` (None: all of them)."""
    return [
        _judged(gate, arch, [row for row in rows if row.arch == arch])
        for gate in GATES
        if kernels is None or set(gate.kernels) <= set(kernels)
        for arch in archs
    ]


def _judged(gate: Gate, arch: str, rows: Sequence[Row]) -> Result:
    chosen = [row for row in rows if not gate.kernels or row.kernel in gate.kernels]
    problems = {}
    for row in chosen:
        if gate.problem is None:
            problems[row.name] = row.error
        elif row.figures:
            problems[row.name] = gate.problem(row, row.figures)
    problems = {name: text for name, text in problems.items() if text}
    return Result(gate.name, arch, len(chosen), problems)


def _spills(_: Row, found: Figures) -> str:
    taken = found.resources
    if not taken.spilled:
        return ""
    return f"{taken.spills} spill instructions, {taken.stack_bytes} bytes of stack"


def _does_not_fit(_: Row, found: Figures) -> str:
    taken = found.resources
    if found.ctas:
        return ""
    return f"{taken.registers} registers × {taken.warps} warps, {taken.shared_bytes} shared bytes"


def _lacks_tensor_cores(row: Row, found: Figures) -> str:
    return "no tensor-core instruction" if row.multiplies and not found.resources.tensor else ""


def _wastes_bandwidth(row: Row, found: Figures) -> str:
    """Return accesses narrower than possible and, on NVIDIA, bytes moved more than once."""
    taken, moved = found.resources, found.traffic
    wide = WIDE in taken.loads and set(taken.stores) == {WIDE}
    problems = []
    if TARGETS[row.arch].backend == "cuda":
        if moved is None:
            return "it has a loop: its bytes cannot be counted"
        wide = moved.wide
        if abs(moved.excess) > EXCESS:
            problems.append(f"bytes {moved.excess:+.1%}")
    if not wide:
        problems.append(f"loads {taken.loads}, stores {taken.stores}")
    return "; ".join(problems)


GATES = (
    Gate("compiles", None),
    Gate("fits on an SM", _does_not_fit),
    Gate("no spill, no stack", _spills),
    Gate("products on tensor cores", _lacks_tensor_cores),
    Gate(f"dequantise: bytes within {EXCESS:.0%}, {WIDE} bits wide", _wastes_bandwidth, STREAMS),
)
