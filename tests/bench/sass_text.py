"""SASS written by hand, for tests: instructions with chosen control words."""

from __future__ import annotations

from bench.static.sass import NO_SCOREBOARD, Instruction

BYTES = 16


def instruction(text: str, address: int = 0, **control: int) -> Instruction:
    """Of "@P0 FADD R1, R2, R3"; control: stall, write, read, wait as in Instruction."""
    predicate = ""
    if text.startswith("@"):
        predicate, _, text = text[1:].partition(" ")
    opcode, _, operands = text.partition(" ")
    fields = {"stall": 1, "write": NO_SCOREBOARD, "read": NO_SCOREBOARD, "wait": 0} | control
    return Instruction(address, predicate, opcode, operands, **fields)


def program(*lines: str | tuple[str, dict[str, int]]) -> list[Instruction]:
    """One instruction per line at 0x00, 0x10, …; a line may come with its control fields."""
    code = []
    for number, line in enumerate(lines):
        text, control = (line, {}) if isinstance(line, str) else line
        code.append(instruction(text, number * BYTES, **control))
    return code
