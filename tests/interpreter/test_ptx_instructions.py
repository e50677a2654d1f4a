"""Each PTX instruction against a definition in Python integers and fractions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.interpreter import ptx
from tests.interpreter.exact_rounding import BFLOAT16, FLOAT16, FLOAT32, FloatFormat, nearest

MASK = 0xFFFFFFFF
words = st.integers(0, MASK) | st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, MASK, 0x12345678])
amounts = st.integers(0, 70) | words
halves = st.integers(0, 0xFFFF)


def execute(
    statement: str, *inputs: list[int], outputs: tuple[int, ...] = (32,), width: int = 32
) -> list[list[int]]:
    """Run one statement on lists of bits; `$0`, … are outputs of `outputs` bits, then inputs."""
    widths = (width,) * len(inputs)
    arrays = [np.array(values, f"u{width // 8}")[:, None] for values in inputs]
    with np.errstate(all="ignore"):
        results = ptx.parse(statement + ";", outputs, widths).run(arrays, no_load)
    return [np.broadcast_to(bits, (len(inputs[0]), 1))[:, 0].tolist() for bits in results]


def no_load(addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    raise AssertionError("no instruction here loads")


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def float16(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def bfloat16(bits: int) -> float:
    return float32(bits << 16)


def bits_of(value: float, target: FloatFormat) -> int:
    """Return the bits of a number of the format; NaN as the hardware writes it."""
    if math.isnan(value):
        return {FLOAT32: 0x7FFFFFFF}.get(target, 0x7FFF)
    code = struct.pack("<e" if target is FLOAT16 else "<f", value)
    number = int.from_bytes(code, "little")
    return number >> 16 if target is BFLOAT16 else number


def byte_permute(a: int, b: int, selector: int) -> int:
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for position in range(4):
        nibble = selector >> 4 * position & 15
        byte = pool[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def any_logic(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for i in range(32):
        index = (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)
        result |= (table >> index & 1) << i
    return result


def extract(a: int, position: int, length: int, *, sign: bool) -> int:
    position, length = position & 255, length & 255
    fill = a >> min(position + length - 1, 31) & 1 if sign and length else 0
    result = 0
    for i in range(32):
        bit = a >> (position + i) & 1 if i < length and position + i < 32 else fill
        result |= bit << i
    return result


def insert(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


INTEGER = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.s32": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(a, b, key=signed),
    "max.s32": lambda a, b: max(a, b, key=signed),
    "min.u32": min,
    "max.u32": max,
    "shl.b32": lambda a, n: a << min(n, 32),
    "shr.u32": lambda a, n: a >> min(n, 32),
    "shr.b32": lambda a, n: a >> min(n, 32),
    "shr.s32": lambda a, n: signed(a) >> min(n, 32),
}
MORE_INTEGER = {
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "prmt.b32": byte_permute,
    "bfe.u32": lambda a, p, n: extract(a, p, n, sign=False),
    "bfe.s32": lambda a, p, n: extract(a, p, n, sign=True),
}


@pytest.mark.parametrize("mnemonic", INTEGER)
@given(st.lists(st.tuples(words, amounts), min_size=1))
@settings(max_examples=25)
def test_integers(mnemonic: str, cases: list[tuple[int, int]]) -> None:
    a, b = map(list, zip(*cases, strict=True))
    expected = [INTEGER[mnemonic](*case) & MASK for case in cases]
    assert execute(f"{mnemonic} $0, $1, $2", a, b) == [expected]


@pytest.mark.parametrize("mnemonic", MORE_INTEGER)
@given(st.lists(st.tuples(words, amounts, amounts), min_size=1))
@settings(max_examples=25)
def test_integers_of_three(mnemonic: str, cases: list[tuple[int, int, int]]) -> None:
    columns = map(list, zip(*cases, strict=True))
    expected = [MORE_INTEGER[mnemonic](*case) & MASK for case in cases]
    assert execute(f"{mnemonic} $0, $1, $2, $3", *columns) == [expected]


@given(words, words, st.lists(words, min_size=2))
def test_byte_permutation_of_and_by_literals(a: int, b: int, many: list[int]) -> None:
    expected = [byte_permute(a, b, selector) for selector in many]
    assert execute(f"prmt.b32 $0, {a}, {b}, $1", many) == [expected]
    expected = [byte_permute(word, b, a) for word in many]
    assert execute(f"prmt.b32 $0, $1, {b}, {a}", many) == [expected]


@given(words, words, words, st.integers(0, 255), amounts, amounts)
def test_not_lop3_and_bfi(a: int, b: int, c: int, table: int, position: int, length: int) -> None:
    assert execute("not.b32 $0, $1", [a]) == [[~a & MASK]]
    logic = execute(f"lop3.b32 $0, $1, $2, $3, {table:#x}", [a], [b], [c])
    assert logic == [[any_logic(a, b, c, table)]]
    inserted = execute("bfi.b32 $0, $1, $2, $3, $4", [a], [b], [position], [length])
    assert inserted == [[insert(a, b, position, length)]]


@given(words, words)
def test_wide_products(a: int, b: int) -> None:
    assert execute("mul.wide.u32 $0, $1, $2", [a], [b], outputs=(64,)) == [[a * b]]
    product = signed(a) * signed(b) & (1 << 64) - 1
    assert execute("mul.wide.s32 $0, $1, $2", [a], [b], outputs=(64,)) == [[product]]
    sum_ = a * b + 0x123456789ABCDEF & (1 << 64) - 1
    assert execute("mad.wide.u32 $0, $1, $2, 0x123456789ABCDEF", [a], [b], outputs=(64,)) == [
        [sum_]
    ]


@given(words)
@example(0x80FF7F01)
def test_moves(a: int) -> None:
    low, high = a & 0xFFFF, a >> 16
    assert execute("mov.b32 $0, $1", [a]) == [[a]]
    assert execute("mov.b32 {$0, $1}, $2", [a], outputs=(16, 16)) == [[low], [high]]
    assert execute("mov.b32 $0, {$1, $2}", [low], [high], width=16) == [[a]]
    assert execute("mov.b64 $0, {$1, $2}", [a], [7], outputs=(64,)) == [[7 << 32 | a]]
    assert execute(f"mov.u32 $0, {a}", [0]) == [[a]]
    assert execute(f"mov.f32 $0, 0f{a:08X}", [0]) == [[a]]


@given(words)
@example(0x80FF7F81)
def test_integer_conversions(a: int) -> None:
    assert execute("cvt.u32.u8 $0, $1", [a]) == [[a & 255]]
    assert execute("cvt.s32.s8 $0, $1", [a]) == [[signed(a & 255, 8) & MASK]]
    assert execute("cvt.u64.u32 $0, $1", [a], outputs=(64,)) == [[a]]
    assert execute("cvt.s64.s32 $0, $1", [a], outputs=(64,)) == [[signed(a) & (1 << 64) - 1]]
    assert execute("cvt.u16.u32 $0, $1", [a], outputs=(16,)) == [[a & 0xFFFF]]
    for kind, value in (("u32", a), ("s32", signed(a))):
        expected = bits_of(nearest(Fraction(value), FLOAT32), FLOAT32)
        assert execute(f"cvt.rn.f32.{kind} $0, $1", [a]) == [[expected]]


def arithmetic(
    compute: Callable[..., Fraction], target: FloatFormat, *values: float
) -> float | None:
    """Compute with one rounding; None if a value is not finite or a zero's sign decides."""
    if not all(map(math.isfinite, values)):
        return None
    exact = compute(*map(Fraction, values))
    return nearest(exact, target) if exact else None


FLOAT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}
TYPES = {
    "f32": (FLOAT32, float32, 32),
    "f16": (FLOAT16, float16, 16),
    "bf16": (BFLOAT16, bfloat16, 16),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", FLOAT)
@given(data=st.data())
@settings(max_examples=60)
def test_float_arithmetic(name: str, kind: str, data: st.DataObject) -> None:
    target, decode, width = TYPES[kind]
    # Exponents near to each other, so that sums are not just the larger operand.
    near_one = st.integers(0, (1 << width) - 1).map(
        lambda bits: bits & ~(0b11 << width - 3) | 0b01 << width - 3
    )
    operands = [
        data.draw(near_one | st.integers(0, (1 << width) - 1))
        for _ in range(3 if name == "fma" else 2)
    ]
    values = [decode(bits) for bits in operands]
    names = ", ".join(f"${n}" for n in range(len(operands) + 1))
    [[actual]] = execute(
        f"{name}.rn.{kind} {names}", *([b] for b in operands), outputs=(width,), width=width
    )
    expected = arithmetic(FLOAT[name], target, *values)
    if expected is not None:
        assert decode(actual) == expected
    elif any(map(math.isnan, values)):
        assert math.isnan(decode(actual))
    if width == 16:
        other = 0x3C00 if kind == "f16" else 0x3F80  # 1 in the upper halves
        [[packed]] = execute(f"{name}.rn.{kind}x2 {names}", *([other << 16 | b] for b in operands))
        assert packed & 0xFFFF == actual
        assert decode(packed >> 16) == {"add": 2, "sub": 0, "mul": 1, "fma": 2}[name]


@given(words, words)
@example(0x3F808000, 0x3F818000)
@example(0x7FC00000, 0x7F800000)
@example(0xFF800001, 0x00007FFF)
@example(0x477FF000, 0x33000000)
@example(0x7F7FFFFF, 0x33000001)
def test_narrowing(a: int, b: int) -> None:
    for kind, target in (("f16", FLOAT16), ("bf16", BFLOAT16)):
        narrow = [
            bits_of(value, target) if math.isnan(value) or math.isinf(value) or value == 0
            else bits_of(nearest(Fraction(value), target), target) | (bits >> 31 << 15)
            for bits in (a, b)
            for value in [float32(bits)]
        ]  # fmt: skip
        [[first]] = execute(f"cvt.rn.{kind}.f32 $0, $1", [a], outputs=(16,))
        assert first == narrow[0]
        [[both]] = execute(f"cvt.rn.{kind}x2.f32 $0, $1, $2", [a], [b])
        assert both == narrow[0] << 16 | narrow[1]


@given(halves)
def test_widening(a: int) -> None:
    for kind, decode in (("f16", float16), ("bf16", bfloat16)):
        [[actual]] = execute(f"cvt.f32.{kind} $0, $1", [a], width=16)
        assert float32(actual) == decode(a) or (
            math.isnan(decode(a)) and math.isnan(float32(actual))
        )


@given(words, words)
@example(0x7FC00000, 0x3F800000)
@example(0x3F800000, 0x7FC00000)
def test_float_extrema(a: int, b: int) -> None:
    numbers = [x for x in (float32(a), float32(b)) if not math.isnan(x)]
    for name, choose in (("min", min), ("max", max)):
        [[actual]] = execute(f"{name}.f32 $0, $1, $2", [a], [b])
        assert float32(actual) == choose(numbers) if numbers else math.isnan(float32(actual))
