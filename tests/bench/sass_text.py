"""SASS written by hand, for tests."""

from __future__ import annotations

from bench.static.sass import Instruction

BYTES = 16


def program(*lines: str) -> list[Instruction]:
    """Return one instruction per line, such as "FADD R1, R2, R3", at 0x00, 0x10, …"""
    split = (line.partition(" ") for line in lines)
    return [Instruction(n * BYTES, opcode, rest) for n, (opcode, _, rest) in enumerate(split)]
