"""Counts a kernel's resources and instructions in the binary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.static.mix import TENSOR, access_bits, instruction_class
from bench.static.sass import Instruction

WIDE = 128
"""Bits per lane of the widest access of every target."""


@dataclass(frozen=True)
class Resources:
    """A kernel's resources.

    Per thread: registers, stack_bytes, and how many instructions spill. Per CTA: shared_bytes,
    warps. loads, stores: global accesses by bits per lane, where asynchronous copies count as
    loads, and tensor-descriptor copies, which have no lanes, as 0 bits. tensor: tensor-core
    instructions by opcode. mix: all instructions by the unit that runs them. On AMD only:
    accumulators, its AGPRs; scalars, its SGPRs; parked_scalars, scalars kept in lanes of vector
    registers, which are no spills because they use no memory.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    warps: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    tensor: dict[str, int] = field(default_factory=dict)
    mix: dict[str, int] = field(default_factory=dict)
    accumulators: int = 0
    scalars: int = 0
    parked_scalars: int = 0

    @property
    def spilled(self) -> bool:
        return self.spills > 0 or self.stack_bytes > 0


def sass_resources(
    code: Sequence[Instruction], usage: dict[str, int], *, shared_bytes: int, warps: int
) -> Resources:
    """Return the resources, from instructions and cuobjdump's usage (`sass.resource_usage`)."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    tensor: Counter[str] = Counter()
    mix: Counter[str] = Counter()
    for instruction in code:
        kind = instruction_class(instruction.opcode)
        mix[kind] += 1
        if kind in ("global load", "asynchronous copy"):
            loads[access_bits(instruction)] += 1
        elif kind == "global store":
            stores[access_bits(instruction)] += 1
        elif kind == "bulk copy" and instruction.base in ("UTMALDG", "UTMASTG"):
            (loads if instruction.base == "UTMALDG" else stores)[0] += 1
        elif kind in TENSOR:
            tensor[instruction.base] += 1
    return Resources(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spills=mix["spill"],
        shared_bytes=shared_bytes,
        warps=warps,
        loads=dict(loads),
        stores=dict(stores),
        tensor=dict(tensor),
        mix=dict(mix),
    )
