"""PTX of the decoders: texts for `tl.inline_asm_elementwise`, made from a codebook and a dtype.

Docstrings say what a text turns its inputs ($8, …) into. In a word, weight 2i is the high nibble of
byte i and weight 2i + 1 the low one (bitsandbytes).
"""

from __future__ import annotations

import functools
import struct

PACKED = {"bf16": "cvt.rn.bf16x2.f32", "fp16": "cvt.rn.f16x2.f32"}
"""Instructions that pack two float32, the first into the high half, rounded to nearest even."""


def float_literal(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


def unpacked(words: list[str]) -> str:
    """Return PTX that splits each of `words` into 16-bit outputs $0, $1, …, low half first."""
    return "".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {word};\n" for i, word in enumerate(words))


@functools.cache
def scaled_table(codebook: tuple[float, ...], dtype: str) -> str:
    """Return PTX: $8 (f32 scale) → eight words, low bytes, then high bytes, of the sixteen scaled
    values."""
    text = "{\n.reg .f32 t0, t1, t2, t3;\n.reg .b32 p0, p1;\n"
    for group in range(4):
        for j, value in enumerate(codebook[4 * group : 4 * group + 4]):
            # A scale is not negative, so that zeros keep their sign.
            trivial = {1.0: "$8", 0.0: float_literal(value)}.get(value)
            product = f"mul.rn.f32 t{j}, $8, {float_literal(value)};\n"
            text += f"mov.f32 t{j}, {trivial};\n" if trivial else product
        text += f"{PACKED[dtype]} p0, t1, t0;\n{PACKED[dtype]} p1, t3, t2;\n"
        text += f"prmt.b32 ${group}, p0, p1, 0x6420;\nprmt.b32 ${4 + group}, p0, p1, 0x7531;\n"
    return text + "}"


@functools.cache
def table_lookup() -> str:
    """Return PTX: $8 (a word) and the table $9 … $16 → eight 16-bit values.

    A permutation looks up the low three bits of four nibbles at once in eight bytes; a second one
    chooses, by the fourth bit, between the lower and the upper half of the table.
    """
    text = "{\n.reg .b32 o0, o1, o2, o3, a, s, l0, l1, h0, h1;\n"
    text += "and.b32 a, $8, 0x77777777;\nshr.u32 s, $8, 1;\n"
    text += "lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;\n"
    for half in range(2):
        if half:
            text += "shr.u32 a, a, 16;\nshr.u32 s, s, 16;\n"
        for plane, first in (("l", 9), ("h", 13)):
            text += f"prmt.b32 {plane}0, ${first}, ${first + 1}, a;\n"
            text += f"prmt.b32 {plane}1, ${first + 2}, ${first + 3}, a;\n"
            text += f"prmt.b32 {plane}0, {plane}0, {plane}1, s;\n"
        # Nibble 1 of a byte pair is weight 0: swap the pair while interleaving the planes.
        text += f"prmt.b32 o{2 * half}, l0, h0, 0x4051;\n"
        text += f"prmt.b32 o{2 * half + 1}, l0, h0, 0x6273;\n"
    return text + unpacked(["o0", "o1", "o2", "o3"]) + "}"


LANE_TABLE = (
    "{\n.reg .b32 l;\n.reg .b64 a;\nmov.u32 l, %laneid;\nand.b32 l, l, 15;\n"
    "mad.wide.u32 a, l, 4, $1;\nld.global.nc.b32 $0, [a];\n}"
)
"""PTX: $1 (address of sixteen 4-byte values) → the value at the lane's number modulo 16."""


@functools.cache
def lane_lookup(dtype: str) -> str:
    """Return PTX: $8 (a word), $9 (the lane table), $10 (f32 scale) → eight 16-bit values.

    Clamp and segment mask 0x100f: lane i reads lane (i & 16) + (index & 15), so the index's other
    bits need no masking.
    """
    text = "{\n.reg .b32 i, w, p;\n.reg .f32 even, odd;\n"
    words = [f"o{pair}" for pair in range(4)]
    text += f".reg .b32 {', '.join(words)};\n"
    for pair, word in enumerate(words):
        for name, shift in (("even", 8 * pair + 4), ("odd", 8 * pair)):
            source = "i" if shift else "$8"
            text += f"shr.u32 i, $8, {shift};\n" if shift else ""
            text += f"shfl.sync.idx.b32 w, $9, {source}, 0x100f, 0xffffffff;\n"
            text += f"mov.b32 {name}, w;\nmul.rn.f32 {name}, {name}, $10;\n"
        text += f"{PACKED[dtype]} {word}, odd, even;\n"
    return text + unpacked(words) + "}"


@functools.cache
def int8_lookup(dtype: str) -> str:
    """Return PTX: $4 (four int8), $5 (f32 scale) → four 16-bit values.

    0x4B0000bb is 2**23 + bb; with the codes' sign bits flipped, bb is the code + 128.
    """
    text = "{\n.reg .b32 w, o0, o1;\n.reg .b32 b;\n.reg .f32 even, odd;\n"
    text += "xor.b32 w, $4, 0x80808080;\n"
    for pair in range(2):
        for name, byte in (("even", 2 * pair), ("odd", 2 * pair + 1)):
            text += f"prmt.b32 b, w, 0x4B000000, 0x{0x7540 | byte:04x};\nmov.b32 {name}, b;\n"
            text += f"sub.rn.f32 {name}, {name}, {float_literal(2.0**23 + 128)};\n"
            text += f"mul.rn.f32 {name}, {name}, $5;\n"
        text += f"{PACKED[dtype]} o{pair}, odd, even;\n"
    return text + unpacked(["o0", "o1"]) + "}"
