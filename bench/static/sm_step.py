"""Instructions as the SM model sees them: which unit, for how long, and what they wait for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from bench.static.mix import access_bits, instruction_class, macs, wgmma_columns
from bench.static.sass import Instruction
from bench.static.sm_table import MACS_PER_MMA, Multiprocessor

LANES = 32
_HEX = re.compile(r"0x([0-9a-f]+)")
_BARRIER = re.compile(r"^(0x[0-9a-f]+|R\d+)(?:, (0x[0-9a-f]+))?$")


class Unit(IntEnum):
    """The units of a sub-core that an instruction can find busy."""

    NONE = -1
    TENSOR = 0
    ALU = 1
    FLOAT = 2
    MULTIPLY = 3
    SPECIAL = 4
    UNIFORM = 5


class Effect(IntEnum):
    """What issuing does besides keeping a unit busy."""

    PLAIN = 0
    MEMORY = 1
    ASYNCHRONOUS_COPY = 2
    CLOSE_COPIES = 3
    WGMMA = 4
    BARRIER = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction, ready to simulate. Times in cycles.

    busy: of the unit. memory: of the SM's one path to shared memory and cache. latency: until the
    write scoreboard is released, counted from the memory path where there is an effect MEMORY.
    A wgmma keeps its unit busy without waiting for it; operands from shared memory cost memory.
    waits: scoreboards. copies_left, wgmmas_left: as many groups may be outstanding at issue, -1
    for any number. group_end: of a wgmma. arrivals: warps that a barrier waits for, 0 for all.
    """

    unit: Unit
    busy: float
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]
    effect: Effect
    latency: float
    memory: float
    copies_left: int
    wgmmas_left: int
    group_end: bool
    barrier: str
    arrivals: int
    blocks: bool


def steps(code: Sequence[Instruction], sm: Multiprocessor) -> list[Step]:
    return [_step(instruction, sm) for instruction in code]


def _step(instruction: Instruction, sm: Multiprocessor) -> Step:
    kind = instruction_class(instruction.opcode)
    unit, busy = _unit(instruction, kind, sm)
    effect, latency, memory = _effect(instruction, kind, unit, busy, sm)
    barrier, arrivals, blocks = "", 0, False
    if instruction.base == "BAR":
        barrier, arrivals = _barrier(instruction)
        blocks = not {"ARV", "RED"} & set(instruction.modifiers)
        effect = Effect.BARRIER
    return Step(
        unit=unit,
        busy=busy,
        stall=max(1, instruction.stall),
        write=instruction.write,
        read=instruction.read,
        waits=tuple(n for n in range(6) if instruction.wait >> n & 1),
        effect=effect,
        latency=latency,
        memory=memory,
        copies_left=_count(instruction) if instruction.base == "DEPBAR" else -1,
        wgmmas_left=_count(instruction) if instruction.opcode.startswith("WARPGROUP.DEP") else -1,
        group_end="gsb0" in instruction.operands,
        barrier=barrier,
        arrivals=arrivals,
        blocks=blocks,
    )


def _unit(instruction: Instruction, kind: str, sm: Multiprocessor) -> tuple[Unit, float]:
    if kind == "mma":
        rate = {"IMMA": 2.0, "QMMA": 2.0}.get(instruction.base, 1.0)
        rate *= 0.5 if any("TF32" in part for part in instruction.modifiers) else 1.0
        return Unit.TENSOR, sm.mma * macs(instruction, warps=1) / MACS_PER_MMA / rate
    if kind in ("alu", "float pack"):
        if instruction.base == "MOV" and sm.move < sm.alu:
            return Unit.FLOAT, sm.move
        return Unit.ALU, sm.alu
    if kind == "float":
        return Unit.FLOAT, sm.float32
    if kind == "half pair":
        bfloat16 = any("BF16" in part for part in instruction.modifiers)
        return Unit.MULTIPLY, sm.bfloat16_pair if bfloat16 else sm.half_pair
    if kind == "integer multiply":
        wide = "WIDE" in instruction.modifiers
        return Unit.MULTIPLY, sm.wide_multiply if wide else sm.integer_multiply
    if kind == "special function":
        return Unit.SPECIAL, sm.special
    if kind == "uniform":
        return Unit.UNIFORM, sm.uniform
    if kind == "wgmma" and sm.wgmma_macs:
        return Unit.TENSOR, macs(instruction, warps=4) / sm.wgmma_macs
    return Unit.NONE, 0.0


def _effect(
    instruction: Instruction, kind: str, unit: Unit, busy: float, sm: Multiprocessor
) -> tuple[Effect, float, float]:
    """The effect, its latency, and the cycles of the memory path."""
    if kind == "wgmma":
        return Effect.WGMMA, sm.wgmma_latency, _wgmma_bytes(instruction) / sm.shared_bytes_per_cycle
    if unit is Unit.TENSOR:
        return Effect.PLAIN, max(24.0, busy + 16.0), 0.0
    if instruction.opcode.startswith("LDGDEPBAR"):
        return Effect.CLOSE_COPIES, 0.0, 0.0
    moved = access_bits(instruction) * LANES // 8
    shared = max(1.0, moved / sm.shared_bytes_per_cycle)
    through_cache = max(1.0, moved / sm.global_bytes_per_cycle)
    if instruction.predicate in ("!PT", "!UPT"):  # a placeholder that only waits
        shared = through_cache = 0.0
    if kind in ("shared load", "shuffle"):
        return Effect.MEMORY, sm.shared_latency, shared
    if kind == "shared store":
        return Effect.MEMORY, sm.store_latency, shared
    if kind == "global load":
        return Effect.MEMORY, sm.global_latency, through_cache
    if kind == "spill":
        load = instruction.base == "LDL"
        return Effect.MEMORY, sm.shared_latency if load else sm.store_latency, through_cache
    if kind == "global store":
        return Effect.MEMORY, sm.store_latency, through_cache
    if kind == "asynchronous copy":
        return Effect.ASYNCHRONOUS_COPY, sm.global_latency, shared
    if kind in ("special function", "constant") or instruction.base in ("SYNCS", "R2UR"):
        return Effect.PLAIN, sm.variable_latency, 0.0
    if instruction.base in ("MEMBAR", "FENCE"):
        return Effect.PLAIN, sm.fence_latency, 0.0
    return Effect.PLAIN, sm.fixed_latency, 0.0


def _wgmma_bytes(instruction: Instruction) -> float:
    """What one of the four warps reads of shared memory: its share of B, of A unless in registers.

    Both are k = 16 deep and two bytes wide; A has 64 rows.
    """
    left = instruction.operands.split(",")[1].strip()
    a = 64 * 16 * 2 if left.startswith("gdesc") else 0
    return (a + wgmma_columns(instruction) * 16 * 2) / 4


def _count(instruction: Instruction) -> int:
    """How many groups DEPBAR leaves outstanding: its last operand."""
    return int(_HEX.findall(instruction.operands)[-1], 16)


def _barrier(instruction: Instruction) -> tuple[str, int]:
    """The barrier's name and how many warps it waits for (0: all of the CTA)."""
    found = _BARRIER.match(instruction.operands)
    if found is None:
        raise ValueError(f"unknown barrier: {instruction.opcode} {instruction.operands}")
    threads = found.group(2)
    return found.group(1), int(threads, 16) // LANES if threads else 0
