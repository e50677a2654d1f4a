"""Instruction mix: every SASS opcode belongs to one class, named after the unit that runs it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from bench.static.sass import Instruction

# Opcode (without modifiers) -> class. What is not listed is integer and logic work ("alu"),
# except opcodes that begin with U, which run once per warp on the uniform datapath.
CLASSES = {
    "mma": {"HMMA", "IMMA", "QMMA", "OMMA", "DMMA"},
    "wgmma": {"HGMMA", "IGMMA", "QGMMA", "BGMMA"},
    "tensor memory": {"LDTM", "STTM", "UTCCP", "UTCSHIFT"},
    "shared load": {"LDS", "LDSM"},
    "shared store": {"STS", "STSM", "ATOMS"},
    "global load": {"LDG", "LD"},
    "global store": {"STG", "ST", "RED", "ATOMG", "ATOM"},
    "asynchronous copy": {"LDGSTS"},
    "bulk copy": {"UTMALDG", "UTMASTG", "UTMAPF", "UTMAREDG", "UBLKCP", "UBLKPF", "UTMACMDFLUSH"},
    "spill": {"LDL", "STL"},
    "synchronisation": {
        *("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "MEMBAR", "FENCE"),
        *("ERRBAR", "CCTL", "CCTLL", "ARRIVES", "UTCBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "ACQBULK"),
        *("UTMACCTL", "PREEXIT"),
    },
    "shuffle": {"SHFL", "REDUX", "MATCH"},
    "special function": {"MUFU", "I2F", "F2I", "F2F", "FRND", "FCHK", "POPC", "FLO", "BREV"},
    "control": {
        *("BRA", "BRX", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "NOP", "BREAK", "NANOSLEEP", "JMP"),
        *("YIELD", "PLOP3", "VOTE", "VOTEU", "ELECT", "R2UR", "USETMAXREG"),
    },
    "half pair": {"HFMA2", "HMUL2", "HADD2", "HMNMX2", "HSET2", "HSETP2"},
    "float": {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"},
    "integer multiply": {"IMAD", "IDP"},
    "constant": {"LDC", "LDCU", "S2R", "CS2R", "S2UR", "ULDC"},
    "float pack": {"F2FP"},
}
TENSOR = frozenset({"mma", "wgmma", "tcgen05"})
DECODE = frozenset(
    {"alu", "float pack", "half pair", "float", "integer multiply", "shuffle", "special function"}
)
"""The classes that turning codes into weights is made of."""

_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
_TCGEN05 = re.compile(r"UTC[A-Z]*MMA")
_WGMMA_SHAPE = re.compile(r"\b(\d+)x(\d+)x(\d+)\b")

# MACs of one warp's mma.sync by the shape in the opcode (m16n8k16, m16n8k8, m16n8k4).
_MMA_MACS = {"16832": 4096, "16816": 2048, "1688": 1024, "1684": 512}


def instruction_class(opcode: str) -> str:
    """One of CLASSES, or "tcgen05" (the tensor core of sm_100), "uniform", "alu"."""
    base = opcode.partition(".")[0]
    if base in _CLASS_OF:
        return _CLASS_OF[base]
    if _TCGEN05.fullmatch(base):
        return "tcgen05"
    return "uniform" if base.startswith("U") else "alu"


def mix(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many instructions of each class."""
    return Counter(instruction_class(instruction.opcode) for instruction in instructions)


def macs(instruction: Instruction, warps: int) -> int:
    """Multiply-accumulates that a CTA of `warps` warps does by this instruction, all warps issuing
    it; 0 for what is not mma.sync or wgmma. tcgen05 keeps its shape in a descriptor: 0, too.

    Raises ValueError for a tensor-core instruction of a shape that is not known here.
    """
    kind = instruction_class(instruction.opcode)
    if kind == "wgmma":
        shape = _WGMMA_SHAPE.search(f"{instruction.opcode} {instruction.operands}")
        if shape is None:
            raise ValueError(f"no shape in {instruction.opcode} {instruction.operands}")
        m, n, k = (int(size) for size in shape.groups())
        return m * n * k * warps // 4
    if kind == "mma":
        known = [_MMA_MACS[part] for part in instruction.modifiers if part in _MMA_MACS]
        if not known:
            raise ValueError(f"unknown tensor-core shape: {instruction.opcode}")
        return known[0] * warps
    return 0


def wgmma_columns(instruction: Instruction) -> int:
    """N of a wgmma. Raises ValueError if the instruction is not one."""
    shape = _WGMMA_SHAPE.search(f"{instruction.opcode} {instruction.operands}")
    if shape is None:
        raise ValueError(f"not a wgmma: {instruction.opcode}")
    return int(shape.group(2))


def access_bits(instruction: Instruction) -> int:
    """Bits per lane that a memory access moves (32 where the opcode names no width)."""
    if instruction.base in ("LDSM", "STSM"):
        return {"4": 128, "2": 64}.get(instruction.modifiers[-1], 32)
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((widths[part] for part in instruction.modifiers if part in widths), 32)
