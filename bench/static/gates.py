"""What the shipped kernels have to hold, as a table, and whether they do.

Utilization, times and DRAM bounds are *modelled*; everything else is counted in the binaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.static.shipped import Row
from bench.static.verdicts import (
    Judge,
    Verdict,
    adapter_costs,
    compiles,
    control_words_agree,
    decode_instructions,
    fits,
    moves_the_minimum,
    never_spills,
    uses_tensor_cores,
    utilization_near,
    utilization_of,
)

MODELLED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
FORWARD = {"sm_80": 0.85, "sm_89": 0.95, "sm_90": 0.80, "sm_120": 0.95}
TAIL: dict[str, float] = dict.fromkeys(MODELLED, 0.95)
DECODE = {"sm_90": 32.0}


@dataclass(frozen=True)
class Gate:
    """kernels: what it is about; empty: every kernel. archs: where it holds; empty: everywhere."""

    name: str
    judge: Judge
    kernels: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()


GATES = (
    Gate("compiles", compiles),
    Gate("fits on an SM", fits),
    Gate("zero spills", never_spills),
    # They are what the model runs on; sm_100 loads its tensor memory by other rules.
    Gate("control words agree", control_words_agree, archs=MODELLED),
    Gate("tensor cores", uses_tensor_cores),
    Gate(
        "fused forward, modelled utilization",
        utilization_of("fused_forward", FORWARD),
        ("fused_forward",),
        tuple(FORWARD),
    ),
    Gate(
        "fused dX near forward, modelled utilization",
        utilization_near("fused_backward", "fused_forward", 0.05),
        ("fused_forward", "fused_backward"),
        MODELLED,
    ),
    Gate(
        "tail forward, modelled utilization",
        utilization_of("tail_forward", TAIL),
        ("tail_forward",),
        MODELLED,
    ),
    Gate(
        "tail dX near forward, modelled utilization",
        utilization_near("tail_backward", "tail_forward", 0.05),
        ("tail_forward", "tail_backward"),
        MODELLED,
    ),
    *(
        Gate(
            f"adapter of rank {rank}, {kernel}, modelled time",
            adapter_costs(kernel, rank, 0.05),
            (kernel,),
            MODELLED,
        )
        for kernel in ("fused_forward", "fused_backward", "tail_forward", "tail_backward")
        for rank in (16, 64)
    ),
    Gate(
        "instructions per 8 decoded weights",
        decode_instructions("fused_forward", DECODE),
        ("fused_forward",),
        tuple(DECODE),
    ),
    Gate("dequantise streams", moves_the_minimum("dequantize", 0.01), ("dequantize",)),
)


@dataclass(frozen=True)
class Result:
    gate: str
    arch: str
    verdict: Verdict


def evaluate(
    rows: Sequence[Row], archs: Sequence[str], kernels: Sequence[str] | None
) -> list[Result]:
    """Every gate of `archs` whose kernels are all among `kernels` (None: all of them)."""
    return [
        Result(gate.name, arch, verdict)
        for gate in GATES
        if kernels is None or set(gate.kernels) <= set(kernels)
        for arch in archs
        if not gate.archs or arch in gate.archs
        for verdict in gate.judge(arch, [row for row in rows if row.arch == arch])
    ]
