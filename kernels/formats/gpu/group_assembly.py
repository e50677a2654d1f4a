"""PTX of the decoders of formats in groups: texts for `tl.inline_asm_elementwise`.

Docstrings say what a text turns its inputs ($8, …) into. In a word, weight i is the i-th group of 4
or 8 bits from the lowest on.
"""

from __future__ import annotations

import functools
from typing import Literal

from qlora_compile.kernels.formats.gpu.assembly import PACKED, float_literal, unpacked

_EXACT = 2.0**23
"""The float32 with these bits and a code in the lowest ones is 2**23 + code."""


Zeros = Literal["whole", "fractional", "minimum"]
"""What a float32 operand holds: 2**23 + a whole zero, a zero that may be fractional, or a minimum
to be added to code * scale."""


@functools.cache
def nibble_floats(dtype: str, zeros: Zeros) -> str:
    """Return PTX: $8 (a word of 4-bit codes), $9 (f32 scale) and $10 (f32, as `zeros` says) → eight
    16-bit values, computed in float32."""
    text = ""
    for i in range(8):
        text += f"shr.u32 b, $8, {4 * i};\n" if i else "mov.b32 b, $8;\n"
        text += "lop3.b32 b, b, 15, 0x4B000000, 0xEA;\n"
        text += _scaled(i, "$9", "$10", dtype, zeros)
    return _in_floats(text, 8)


@functools.cache
def byte_floats(dtype: str, zeros: Zeros) -> str:
    """Return PTX like `nibble_floats`: $4 (four 8-bit codes), $5 and $6 → four values."""
    text = ""
    for i in range(4):
        text += f"prmt.b32 b, $4, 0x4B000000, 0x{0x7540 | i:04x};\n"
        text += _scaled(i, "$5", "$6", dtype, zeros)
    return _in_floats(text, 4)


def _scaled(i: int, scale: str, zero: str, dtype: str, zeros: Zeros) -> str:
    """Return PTX that computes weight i from 2**23 + code in `b`; every second one closes a
    pair."""
    name = "odd" if i % 2 else "even"
    text = f"mov.b32 {name}, b;\n"
    if zeros != "whole":
        text += f"sub.rn.f32 {name}, {name}, {float_literal(_EXACT)};\n"
    if zeros != "minimum":
        text += f"sub.rn.f32 {name}, {name}, {zero};\n"
    text += f"mul.rn.f32 {name}, {name}, {scale};\n"
    if zeros == "minimum":
        text += f"add.rn.f32 {name}, {name}, {zero};\n"
    return text + (f"{PACKED[dtype]} o{i // 2}, odd, even;\n" if i % 2 else "")


def _in_floats(text: str, count: int) -> str:
    words = [f"o{i}" for i in range(count // 2)]
    registers = f".reg .b32 b, {', '.join(words)};\n.reg .f32 even, odd;\n"
    return "{\n" + registers + text + unpacked(words) + "}"


_PAIRS = {
    "bf16": ("bf16x2", 0x4300, 0xC300, 0x3F80),
    "fp16": ("f16x2", 0x6400, 0xE400, 0x3C00),
}
"""For each dtype: the suffix of instructions on two of it; 128 or 1024, in whose lowest bits a code
counts ones; the negative of that number; one."""


@functools.cache
def nibble_pairs(dtype: str) -> str:
    """Return PTX: $8 (a word of 4-bit codes), $9 and $10 (a scale and minus a whole zero, 16 bits
    each, twice) → eight values of the same dtype, two at a time.

    The values equal float32's: code - zero is exact, and its product with a 16-bit scale is exact
    in float32, so that it is rounded once either way.
    """
    kind, *numbers = _PAIRS[dtype]
    magic, minus, one = (f"0x{number << 16 | number:08X}" for number in numbers)
    words = [f"o{i}" for i in range(4)]
    text = f"{{\n.reg .b32 high, scale, zero, one, minus, none, {', '.join(words)};\n"
    text += f"mov.b32 one, {one};\nmov.b32 minus, {minus};\nmov.b32 none, 0x80008000;\n"
    text += "mov.b32 scale, $9;\nmov.b32 zero, $10;\nshr.u32 high, $8, 4;\n"
    for i, word in enumerate(words):
        # Byte i of the word for the lower half, of the word's upper nibbles for the upper half.
        text += f"prmt.b32 {word}, $8, high, 0x{0x0400 + (i << 8) + i:04x};\n"
        text += f"lop3.b32 {word}, {word}, 0x000F000F, {magic}, 0xEA;\n"
        text += f"fma.rn.{kind} {word}, {word}, one, minus;\n"
        text += f"fma.rn.{kind} {word}, {word}, one, zero;\n"
        # Minus zero is added to the product, so that it keeps its sign.
        text += f"fma.rn.{kind} {word}, {word}, scale, none;\n"
    return text + unpacked(words) + "}"


@functools.cache
def byte_halves(dtype: str, exponent_bits: int) -> str:
    """Return PTX: $4 (four 8-bit floats, 4 or 5 bits of exponent), $5 (f32 scale) → four values.

    A code becomes a float16: e5m2 with eight bits more, e4m3 with an exponent biased by 15 and not
    by 7, which is 2**8 times too small, and with bit 14 set in addition for NaN.
    """
    words = ["o0", "o1"]
    text = "{\n.reg .b32 n, h, m, factor, none, o0, o1;\n.reg .b16 low, high;\n"
    text += ".reg .f32 even, odd;\n"
    if exponent_bits == 4:
        text += "mov.b32 factor, 0x5C005C00;\nmov.b32 none, 0x80008000;\n"
        # Bit 7 of each byte: whether the seven others are all set.
        text += "and.b32 n, $4, 0x7F7F7F7F;\nadd.u32 n, n, 0x01010101;\n"
    for i, word in enumerate(words):
        selector = 0x0404 | (2 * i + 1) << 12 | (2 * i) << 4
        text += f"prmt.b32 h, $4, 0, 0x{selector:04x};\n"
        if exponent_bits == 4:
            text += f"prmt.b32 m, n, 0, 0x{selector:04x};\n"
            # h where the mask is set, else m.
            text += "lop3.b32 m, h, m, 0x7F007F00, 0xE4;\nshr.u32 m, m, 1;\n"
            text += "lop3.b32 h, h, 0x80008000, m, 0xEA;\nfma.rn.f16x2 h, h, factor, none;\n"
        text += "mov.b32 {low, high}, h;\ncvt.f32.f16 even, low;\ncvt.f32.f16 odd, high;\n"
        text += "mul.rn.f32 even, even, $5;\nmul.rn.f32 odd, odd, $5;\n"
        text += f"{PACKED[dtype]} {word}, odd, even;\n"
    return text + unpacked(words) + "}"


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.cache
def scaled_magnitudes(dtype: str) -> str:
    """Return PTX: $4 (f32 scale) → four words, low bytes, then high bytes, of e2m1's eight scaled
    magnitudes."""
    text = "{\n.reg .f32 t0, t1, t2, t3;\n.reg .b32 p0, p1;\n"
    for group in range(2):
        for j, value in enumerate(_MAGNITUDES[4 * group : 4 * group + 4]):
            text += f"mul.rn.f32 t{j}, $4, {float_literal(value)};\n"
        text += f"{PACKED[dtype]} p0, t1, t0;\n{PACKED[dtype]} p1, t3, t2;\n"
        text += f"prmt.b32 ${group}, p0, p1, 0x6420;\nprmt.b32 ${2 + group}, p0, p1, 0x7531;\n"
    return text + "}"


@functools.cache
def magnitude_lookup() -> str:
    """Return PTX: $8 (a word) and the table $9 … $12 → eight 16-bit values.

    A permutation looks up the low three bits of four nibbles at once; for the high bytes a second
    one chooses, by the fourth bit, between the table and the negative table.
    """
    text = "{\n.reg .b32 o0, o1, o2, o3, a, s, low, high, minus, m0, m1;\n"
    text += "xor.b32 m0, $11, 0x80808080;\nxor.b32 m1, $12, 0x80808080;\n"
    text += "and.b32 a, $8, 0x77777777;\nshr.u32 s, $8, 1;\n"
    text += "lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;\n"
    for half in range(2):
        if half:
            text += "shr.u32 a, a, 16;\nshr.u32 s, s, 16;\n"
        text += "prmt.b32 low, $9, $10, a;\nprmt.b32 high, $11, $12, a;\n"
        text += "prmt.b32 minus, m0, m1, a;\nprmt.b32 high, high, minus, s;\n"
        text += f"prmt.b32 o{2 * half}, low, high, 0x5140;\n"
        text += f"prmt.b32 o{2 * half + 1}, low, high, 0x7362;\n"
    return text + unpacked(["o0", "o1", "o2", "o3"]) + "}"
