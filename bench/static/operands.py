"""Which registers a SASS instruction reads and writes, by name: "R12", "UR4", "P0", "UP1"."""

from __future__ import annotations

import re

from bench.static.mix import instruction_class
from bench.static.sass import Instruction

_REGISTER = re.compile(r"\b(U?R)(\d+)(\.64|\.F32x2)?|\b(U?P\d)\b")
_ADDRESS = ("[", "desc[", "tmem[", "gdesc[", "idesc[", "c[", "cx[")
_MULTIPLE = re.compile(r"x(\d+)")
_CARRY = frozenset({"IADD3", "IADD", "LEA", "IMAD", "VIADD", "UIADD3", "ULEA", "UIADD"})
_WITHOUT_RESULT = frozenset(
    {
        *("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP"),
        *("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),
        *("NANOSLEEP", "UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG", "PREEXIT", "ACQBULK"),
    }
)


def writes(instruction: Instruction) -> set[str]:
    """The registers that the instruction writes."""
    results, _ = _split(instruction)
    return _named(results, _result_width(instruction))


def reads(instruction: Instruction) -> set[str]:
    """The registers that it reads, its predicate among them."""
    _, sources = _split(instruction)
    found: set[str] = set()
    widths = _source_widths(instruction, len(sources))
    for source, width in zip(sources, widths, strict=True):
        found |= _named([source], width)
    found |= _named([instruction.predicate], 1)
    return found


def _split(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Operands as (results, sources)."""
    operands = [part.strip() for part in _top_level(instruction.operands)]
    if not operands or instruction.base in _WITHOUT_RESULT or operands[0].startswith(_ADDRESS):
        return [], operands
    count = 1
    if re.fullmatch(r"U?P[T0-9]", operands[0]):
        # ISETP P0, PT, …  LOP3 P0, R1, …  SHFL PT, R1, …; but SYNCS and VOTE have one result.
        count = 1 if instruction.base in ("SYNCS", "VOTE", "VOTEU", "ELECT", "R2P", "FCHK") else 2
    elif instruction.base in _CARRY and len(operands) > 1:
        while count < len(operands) and re.fullmatch(r"U?P[T0-9]", operands[count]):
            count += 1
    return operands[:count], operands[count:]


def _top_level(operands: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(operands):
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append(operands[start:position])
            start = position + 1
    return [*parts, operands[start:]] if operands else []


def _named(operands: list[str], width: int) -> set[str]:
    """Register names in `operands`; a data register stands for `width` in a row."""
    found: set[str] = set()
    for operand in operands:
        for kind, number, pair, predicate in _REGISTER.findall(operand):
            if predicate:
                found.add(predicate)
                continue
            count = max(2 if pair else 1, 1 if "[" in operand else width)
            found |= {f"{kind}{n}" for n in range(int(number), int(number) + count)}
    return found


def _result_width(instruction: Instruction) -> int:
    """32-bit registers in a row that hold the result."""
    kind = instruction_class(instruction.opcode)
    base, modifiers = instruction.base, instruction.modifiers
    if kind in ("mma", "wgmma"):
        return _tensor_widths(instruction)[0]
    if kind == "tensor memory":
        return _multiple(instruction)
    if base == "LDSM":
        return {"4": 4, "2": 2}.get(modifiers[-1], 1)
    if base == "CS2R":
        return 1 if "32" in modifiers else 2
    if base in ("IMAD", "UIMAD") and "WIDE" in modifiers:
        return 2
    return _width(instruction)


def _source_widths(instruction: Instruction, count: int) -> list[int]:
    kind = instruction_class(instruction.opcode)
    if kind in ("mma", "wgmma"):
        widths = _tensor_widths(instruction)[1:]
        return (widths + [1] * count)[:count]
    if kind == "tensor memory":
        return [_multiple(instruction)] * count
    if instruction.base == "STSM":
        return [{"4": 4, "2": 2}.get(instruction.modifiers[-1], 1)] * count
    if kind in ("global store", "shared store") or instruction.base == "STL":
        return [_width(instruction)] * count
    if instruction.base in ("IMAD", "UIMAD") and "WIDE" in instruction.modifiers:
        return [1, 1, *([2] * (count - 2))]
    if kind in ("alu", "float", "uniform"):
        return [_width(instruction)] * count
    return [1] * count


def _width(instruction: Instruction) -> int:
    """By the width modifier; FFMA2 and its like work on pairs."""
    if instruction.base in ("FFMA2", "FMUL2", "FADD2"):
        return 2
    kind = instruction_class(instruction.opcode)
    memory = ("global load", "global store", "shared load", "shared store", "spill", "constant")
    widths = {"256": 8, "128": 4, "64": 2}
    if kind not in memory and not ({"MOV", "IADD", "UMOV", "UIADD"} & {instruction.base}):
        return 1
    return next((widths[m] for m in instruction.modifiers if m in widths), 1)


def _tensor_widths(instruction: Instruction) -> list[int]:
    """Registers of D, A, B, C of mma.sync; of D, A, B, C of wgmma with A or B as descriptors."""
    if instruction_class(instruction.opcode) == "wgmma":
        found = re.search(r"\b(\d+)x(\d+)x(\d+)\b", instruction.opcode)
        columns = int(found.group(2)) if found else 0
        accumulators = columns // 2 if "F32" in instruction.modifiers else columns // 4
        accumulator_last = [accumulators] * 4
        left = _split(instruction)[1][0]
        if left.startswith("gdesc"):
            return [accumulators, 1, accumulators]
        return [accumulators, 4, 1, *accumulator_last]
    accumulator = 4 if {"F32", "S32"} & set(instruction.modifiers) else 2
    if {"16816", "16832"} & set(instruction.modifiers):
        return [accumulator, 4, 2, accumulator]
    return [accumulator, 2, 1, accumulator]


def _multiple(instruction: Instruction) -> int:
    found = [int(m.group(1)) for m in map(_MULTIPLE.fullmatch, instruction.modifiers) if m]
    return found[0] if found else 1
