"""What each PTX instruction that the emulator knows computes, on numpy arrays.

`INSTRUCTIONS` maps the full mnemonic to its operand types and a function of the sources. A type is
PTX's name without the dot: `u32` arrives as uint32, `s32` as int32, `f16` as float16, `bf16` as
the uint16 of its bits, `b32` as uint32, `f16x2` and `bf16x2` as the uint32 of both halves.
Left out on purpose: `mul.f32`, `add.f32` and the like without `.rn`, which ptxas may fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from triton._C.libtriton import interpreter as native  # pyright: ignore[reportMissingImports]

from tests.interpreter.bfloat16 import decode, encode, multiply_add

Values = Any  # numpy arrays of the dtype that the operand's type stands for


class Instruction(NamedTuple):
    """`compute` maps the sources to the destination; lengths and types as in the PTX manual."""

    destination: str
    sources: tuple[str, ...]
    compute: Callable[..., Values]


def lop3(a: Values, b: Values, c: Values, table: Values) -> Values:
    """Compute a bitwise function of three words: bit 4a + 2b + c of `table` is its result."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if int(table.item()) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def prmt(a: Values, b: Values, selector: Values) -> Values:
    """Pick four bytes of {b, a}, each by 3 bits of `selector`; a 4th bit asks for the sign."""
    shape = np.broadcast(a, b, selector).shape
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    if both.size > 1 and selector.size > 1:
        both, selector = np.broadcast_arrays(both, selector)
    pool = np.ascontiguousarray(both).view(np.uint8).reshape(-1, 8)
    pairs = selector.astype(np.uint16).view(np.uint8).reshape(-1, 2)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 4)
    which = nibbles & 7
    if len(pool) == 1:
        picked = pool[0][which]
    elif len(which) == 1:
        picked = pool[:, which[0]]
    else:
        picked = np.take_along_axis(pool, which, axis=1)
    if (nibbles >= 8).any():
        picked = np.where(nibbles >= 8, (picked.view(np.int8) >> 7).view(np.uint8), picked)
    return np.ascontiguousarray(picked).view(np.uint32).reshape(shape)


def shift(numpy_function: Callable[..., Values], value: Values, amount: Values) -> Values:
    """Shift by an amount (uint32), which PTX clamps at the width; in C that is undefined."""
    width = value.dtype.itemsize * 8
    shifted = numpy_function(value, np.minimum(amount, width - 1).astype(value.dtype))
    # Past the width, an arithmetic shift to the right goes on repeating the sign.
    if value.dtype.kind == "i":
        return shifted
    return np.where(amount < width, shifted, value.dtype.type(0))


def bit_field(position: Values, length: Values) -> Values:
    """Return ones in `length` bits from `position` (low bytes of uint32), cut at bit 31."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    ones = shift(np.left_shift, np.uint32(1) + np.zeros_like(length), length) - np.uint32(1)
    return shift(np.left_shift, ones, position)


def bit_field_extract(value: Values, position: Values, length: Values) -> Values:
    """Compute bfe.u32, or bfe.s32 if `value` is int32."""
    low = position & np.uint32(255)
    words = value.view(np.uint32)
    field = shift(np.right_shift, words & bit_field(position, length), low)
    if value.dtype == np.uint32:
        return field
    last = np.minimum(low + (length & np.uint32(255)) - np.uint32(1), np.uint32(31))
    sign = (words >> last) & np.uint32(1)
    none = (length & np.uint32(255)) == 0
    above = ~shift(np.right_shift, bit_field(position, length), low)
    filled: Values = np.bitwise_or(field, above)
    return np.where((sign == 1) & ~none, filled, field).view(np.int32)


def bit_field_insert(source: Values, into: Values, position: Values, length: Values) -> Values:
    ones = bit_field(position, length)
    moved = shift(np.left_shift, source, position & np.uint32(255))
    return (into & ~ones) | (moved & ones)


def multiply_high(a: Values, b: Values) -> Values:
    wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    return ((a.astype(wide) * b.astype(wide)) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def multiply_wide(a: Values, b: Values) -> Values:
    wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    return a.astype(wide) * b.astype(wide)


def fma_float32(a: Values, b: Values, c: Values) -> Values:
    return native.fma_fp32(*(np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c)))


def fma_float16(a: Values, b: Values, c: Values) -> Values:
    # The product has 22 digits and float64 holds 53: no sum near a tie loses a digit.
    return (a.astype(np.float64) * b + c).astype(np.float16)


def to_float16(values: Values) -> Values:
    half = values.astype(np.float16)
    return np.where(np.isnan(half), np.uint16(0x7FFF).view(np.float16), half)


def pair(high: Values, low: Values) -> Values:
    """Return two 16-bit arrays as the halves of uint32 words."""
    high, low = high.view(np.uint16), low.view(np.uint16)
    return (high.astype(np.uint32) << np.uint32(16)) | low


def on_halves(compute: Callable[..., Values], half: type) -> Callable[..., Values]:
    """Apply `compute` to the upper and to the lower halves (dtype `half`) of uint32 words."""

    def packed(*words: Values) -> Values:
        high = compute(*((word >> np.uint32(16)).astype(np.uint16).view(half) for word in words))
        low = compute(*(word.astype(np.uint16).view(half) for word in words))
        return pair(high, low)

    return packed


def on_bfloat16(compute: Callable[..., Values]) -> Callable[..., Values]:
    return lambda *bits: encode(compute(*(decode(operand) for operand in bits)))


def _integer_instructions() -> dict[str, Instruction]:
    table = {}
    for bits in (16, 32, 64):
        b = f"b{bits}"
        table[f"not.{b}"] = Instruction(b, (b,), np.invert)
        table[f"and.{b}"] = Instruction(b, (b, b), np.bitwise_and)
        table[f"or.{b}"] = Instruction(b, (b, b), np.bitwise_or)
        table[f"xor.{b}"] = Instruction(b, (b, b), np.bitwise_xor)
        table[f"shl.{b}"] = Instruction(b, (b, "u32"), lambda a, n: shift(np.left_shift, a, n))
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}"):
            table[f"shr.{kind}"] = Instruction(
                kind, (kind, "u32"), lambda a, n: shift(np.right_shift, a, n)
            )
        for t in (f"u{bits}", f"s{bits}"):
            table[f"add.{t}"] = Instruction(t, (t, t), np.add)
            table[f"sub.{t}"] = Instruction(t, (t, t), np.subtract)
            table[f"min.{t}"] = Instruction(t, (t, t), np.minimum)
            table[f"max.{t}"] = Instruction(t, (t, t), np.maximum)
            table[f"mul.lo.{t}"] = Instruction(t, (t, t), np.multiply)
            table[f"mad.lo.{t}"] = Instruction(t, (t, t, t), lambda a, b, c: a * b + c)
            if bits < 64:
                wide = f"{t[0]}{2 * bits}"
                table[f"mul.hi.{t}"] = Instruction(t, (t, t), multiply_high)
                table[f"mul.wide.{t}"] = Instruction(wide, (t, t), multiply_wide)
                table[f"mad.wide.{t}"] = Instruction(
                    wide, (t, t, wide), lambda a, b, c: multiply_wide(a, b) + c
                )
    for t in ("u32", "s32"):
        table[f"bfe.{t}"] = Instruction(t, (t, "u32", "u32"), bit_field_extract)
    table["bfi.b32"] = Instruction("b32", ("b32", "b32", "u32", "u32"), bit_field_insert)
    table["lop3.b32"] = Instruction("b32", ("b32", "b32", "b32", "immediate"), lop3)
    table["prmt.b32"] = Instruction("b32", ("b32", "b32", "b32"), prmt)
    return table


def _float_instructions() -> dict[str, Instruction]:
    f32 = ("f32", "f32")
    table = {
        "add.rn.f32": Instruction("f32", f32, np.add),
        "sub.rn.f32": Instruction("f32", f32, np.subtract),
        "mul.rn.f32": Instruction("f32", f32, np.multiply),
        "min.f32": Instruction("f32", f32, np.fmin),
        "max.f32": Instruction("f32", f32, np.fmax),
        "fma.rn.f32": Instruction("f32", ("f32", "f32", "f32"), fma_float32),
    }
    for name, compute in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        half, bfloat = compute, on_bfloat16(compute)
        table[f"{name}.rn.f16"] = Instruction("f16", ("f16",) * 2, half)
        table[f"{name}.rn.bf16"] = Instruction("bf16", ("bf16",) * 2, bfloat)
        table[f"{name}.rn.f16x2"] = Instruction("b32", ("b32",) * 2, on_halves(half, np.float16))
        table[f"{name}.rn.bf16x2"] = Instruction("b32", ("b32",) * 2, on_halves(bfloat, np.uint16))
    table["fma.rn.f16"] = Instruction("f16", ("f16",) * 3, fma_float16)
    table["fma.rn.bf16"] = Instruction("bf16", ("bf16",) * 3, multiply_add)
    table["fma.rn.f16x2"] = Instruction("b32", ("b32",) * 3, on_halves(fma_float16, np.float16))
    table["fma.rn.bf16x2"] = Instruction("b32", ("b32",) * 3, on_halves(multiply_add, np.uint16))
    return table


def _conversions() -> dict[str, Instruction]:
    table = {
        "cvt.rn.f16.f32": Instruction("f16", ("f32",), to_float16),
        "cvt.rn.bf16.f32": Instruction("bf16", ("f32",), encode),
        # The first source becomes the upper half.
        "cvt.rn.f16x2.f32": Instruction(
            "b32", ("f32", "f32"), lambda high, low: pair(to_float16(high), to_float16(low))
        ),
        "cvt.rn.bf16x2.f32": Instruction(
            "b32", ("f32", "f32"), lambda high, low: pair(encode(high), encode(low))
        ),
        "cvt.f32.f16": Instruction("f32", ("f16",), lambda a: a.astype(np.float32)),
        "cvt.f32.bf16": Instruction("f32", ("bf16",), decode),
    }
    for t in ("u16", "s16", "u32", "s32"):
        table[f"cvt.rn.f32.{t}"] = Instruction("f32", (t,), lambda a: a.astype(np.float32))
    integers = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]
    for to in integers:
        target = np.dtype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
        for source in integers:
            table[f"cvt.{to}.{source}"] = Instruction(
                to, (source,), lambda a, target=target: a.astype(target)
            )
    return table


INSTRUCTIONS: dict[str, Instruction] = {
    **_integer_instructions(),
    **_float_instructions(),
    **_conversions(),
}
