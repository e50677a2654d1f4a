"""SASS: the instructions of a cubin, as cuobjdump prints them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

_BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;"
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction without its predicate. address: in bytes."""

    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


class DisassemblyError(RuntimeError):
    """cuobjdump failed or printed what this parser does not know."""


def disassemble(cubin: bytes) -> str:
    """Return the SASS as text. Raises DisassemblyError if cuobjdump fails."""
    return _cuobjdump(cubin, "-sass")


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the entries of cuobjdump's resource line, such as `REG` (registers per thread),
    `STACK` and `LOCAL` (bytes per thread). Raises DisassemblyError."""
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
    """Return the instructions in cuobjdump's text, in order of address.

    Raises DisassemblyError if there are none.
    """
    found = [match.groups() for match in map(_INSTRUCTION.match, text.splitlines()) if match]
    if not found:
        raise DisassemblyError("no instruction in the text of cuobjdump")
    return [Instruction(int(address, 16), *rest) for address, *rest in found]


def has_loop(code: Sequence[Instruction]) -> bool:
    """Whether a branch goes back. A branch to itself, which ends every kernel, is not a loop."""
    for instruction in code:
        target = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
        if target and int(target.group(1), 16) < instruction.address:
            return True
    return False
