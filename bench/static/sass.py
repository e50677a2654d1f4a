"""SASS: the instructions of a cubin, each with its control word, as nvdisasm and the encoding say.

Since Volta every instruction is 128 bits wide. The upper 64 hold, from bit 41 on, what the
compiler tells the scheduler: cycles to stall, a yield hint, the scoreboard set when the result is
written, the one set when the sources have been read, the scoreboards to wait for, operand reuse.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

NO_SCOREBOARD = 7
CONTROL_SHIFT = 41

_BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;"
    r"\s*/\*\s*0x([0-9a-f]{16})\s*\*/"
)
_UPPER_HALF = re.compile(r"\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
# ptxas also leaves loops by a predicated CALL.REL.NOINC that nothing returns from.
BRANCHES = frozenset({"BRA", "BRX", "BRXU", "JMP", "CALL"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. address: in bytes. predicate: such as "!P0", or "" if it always runs.

    stall: cycles until the warp may issue again. write, read: the scoreboards released when the
    result is there and when the sources have been read, NO_SCOREBOARD for none. wait: a bit per
    scoreboard that has to be free before issue.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    write: int
    read: int
    wait: int

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def branch_target(self) -> int | None:
        """The address that a branch with a constant target goes to, None for all else."""
        found = _TARGET.search(self.operands) if self.base in BRANCHES else None
        return int(found.group(1), 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether the next instruction can follow a branch or an exit; after a call it does."""
        return (
            self.base == "CALL"
            or self.predicate not in ("", "PT", "UPT")
            or self.operands.startswith(("P", "!P", "UP", "!UP"))
        )


class DisassemblyError(RuntimeError):
    """cuobjdump failed or printed what this parser does not know."""


def disassemble(cubin: bytes) -> str:
    """The SASS with encodings, as text. Raises DisassemblyError if cuobjdump fails."""
    return _cuobjdump(cubin, "-sass")


def resource_usage(cubin: bytes) -> dict[str, int]:
    """`REG` (registers per thread), `STACK` and `LOCAL` (bytes per thread) and the other entries
    of cuobjdump's resource line. Raises DisassemblyError."""
    text = _cuobjdump(cubin, "-res-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise DisassemblyError(f"cuobjdump -res-usage gave no register count:\n{text}")
    return usage


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_BINARIES / "cuobjdump", option, file.name],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise DisassemblyError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def parse(text: str) -> list[Instruction]:
    """The instructions of cuobjdump's text, in order of address.

    Raises DisassemblyError if there are none, or if one lacks the upper half of its encoding.
    """
    instructions: list[Instruction] = []
    pending: re.Match[str] | None = None
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            if pending:
                raise DisassemblyError(f"no control word after {pending.group(0).strip()}")
            pending = found
        elif pending and (found := _UPPER_HALF.match(line)):
            address, predicate, opcode, operands, _ = pending.groups()
            control = int(found.group(1), 16) >> CONTROL_SHIFT
            instructions.append(
                Instruction(
                    address=int(address, 16),
                    predicate=predicate or "",
                    opcode=opcode,
                    operands=operands,
                    stall=control & 15,
                    write=control >> 5 & 7,
                    read=control >> 8 & 7,
                    wait=control >> 11 & 63,
                )
            )
            pending = None
    if not instructions or pending:
        raise DisassemblyError("no complete instruction in the text of cuobjdump")
    return instructions
