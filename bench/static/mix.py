"""Classes of SASS instructions, each named after the unit that runs it."""

from __future__ import annotations

import re

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

_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
_TCGEN05 = re.compile(r"UTC[A-Z]*MMA")


def instruction_class(opcode: str) -> str:
    """Return one of CLASSES, or "tcgen05" (the tensor core of sm_100), "uniform", "alu"."""
    base = opcode.partition(".")[0]
    if base in _CLASS_OF:
        return _CLASS_OF[base]
    if _TCGEN05.fullmatch(base):
        return "tcgen05"
    return "uniform" if base.startswith("U") else "alu"


def access_bits(instruction: Instruction) -> int:
    """Return the bits per lane that a memory access moves (32 if the opcode names no width)."""
    if instruction.base in ("LDSM", "STSM"):
        return {"4": 128, "2": 64}.get(instruction.modifiers[-1], 32)
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((widths[part] for part in instruction.modifiers if part in widths), 32)
