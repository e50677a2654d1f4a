"""Operands of PTX: types, literals, vectors, and which lane a shuffle reads."""

from __future__ import annotations

import re

import numpy as np

WARP = 32
LANES = np.arange(WARP, dtype=np.uint32)[None, :]


class PtxError(RuntimeError):
    """Assembly that the emulator does not know, or that is wrong; names the statement."""


def unsigned(bits: int) -> np.dtype:
    return np.dtype(f"u{bits // 8}")


def numpy_dtype(ptx_type: str) -> np.dtype:
    """Return how an instruction sees an operand; bf16 stays bits."""
    letter, bits = re.fullmatch(r"(bf|b|u|s|f)(\d+)", ptx_type).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return np.dtype({"s": "i", "f": "f"}.get(letter, "u") + str(int(bits) // 8))


def shuffle_origins(control: int) -> np.ndarray:
    """Return the lane that shfl.idx reads, [wanted lane, own lane], for its operand c."""
    segments, clamp = control >> 8 & 31, control & 31
    lane, wanted = np.arange(WARP)[None, :], np.arange(WARP)[:, None]
    first = lane & segments
    last = first | (clamp & ~segments)
    origin = first | (wanted & ~segments & 31)
    return np.where(origin <= last, origin, lane)


def immediate(text: str, width: int) -> int:
    """Return a literal's bits; `0f3F800000` and `0d…` are the bits of a float."""
    if match := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", text):
        if len(match[2]) * 4 == width == {"f": 32, "d": 64}[match[1].lower()]:
            return int(match[2], 16)
        raise PtxError(f"{text} is not a float of {width} bits")
    if not re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|[1-9]\d*|0)U?", text):
        raise PtxError(f"{text} is neither a register nor a literal")
    value = int(text.rstrip("U"), 0)
    if not -(1 << (width - 1)) <= value < 1 << width:
        raise PtxError(f"{text} does not fit in {width} bits")
    return value % (1 << width)


def split_vector(text: str) -> list[str]:
    names = [name.strip() for name in text.strip("{}").split(",")]
    if len(names) not in (2, 4):
        raise PtxError(f"{text} has {len(names)} parts, not 2 or 4")
    return names


def expect(operands: list[str], count: int) -> None:
    if len(operands) != count:
        raise PtxError(f"{len(operands)} operands where {count} belong")
