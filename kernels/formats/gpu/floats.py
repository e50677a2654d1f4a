"""Floats of 8 and 4 bits on the device, decoded by integer operations: exact on every target.

The hardware's own 8-bit floats are not used: sm_80 and sm_86 lack them, and gfx942 has others. Each
code becomes the bits of a float16, whose conversion to float32 is exact, even for subnormal
numbers. The functions implement `scale` and `decode` of `qlora_compile.kernels.gpu.decoders`;
factors and words are those of `groups`.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.formats.gpu.decode import grouped, join4, join8
from qlora_compile.kernels.formats.gpu.groups import load_groups
from qlora_compile.kernels.gpu.weight import edge


@triton.jit
def e5m2_halves(codes):
    return codes << 8


@triton.jit
def e4m3_halves(codes):
    """Return float16 bits of values 2**8 times too small, as e4m3's exponents are biased by 7 and
    not by 15. A code with all bits set is NaN."""
    size = codes & 0x7F
    return ((codes & 0x80) << 8) | tl.where(size == 0x7F, 0x7E00, size << 7)


@triton.jit
def e2m1_halves(codes):
    """Return float16 bits of values 2**14 times too small, as e2m1's exponents are biased by 1 and
    not by 15."""
    return ((codes & 8) << 12) | ((codes & 7) << 9)


@triton.jit
def float_of_halves(halves, WEIGHT: tl.constexpr):
    """Return the float32 of float16 bits, times WEIGHT, a power of two; exact."""
    return halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * WEIGHT


@triton.jit
def plain_scales(loaded, side, state, SIDE: tl.constexpr):
    return loaded[0]


@triton.jit
def powers_of_two(loaded, side, state, SIDE: tl.constexpr):
    """Return the float32 of e8m0 bytes, which are the bits of an exponent except for 2**-127 and
    NaN."""
    codes = loaded[0].to(tl.int32)
    bits = tl.where(codes == 0, 0x00400000, codes << 23)
    return tl.where(codes == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


# fmt: off
@triton.jit
def load_scales_of_scales(
    side, n0, k0, N, K,
    SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):
    # fmt: on
    """Do as `load_groups`, with the scale of the whole tensor or of each row in place of zeros."""
    scales, _ = load_groups(side, n0, k0, N, K, SIDE, ROWS, COLUMNS, EVEN_N, EVEN_K)
    rows = n0 + edge(n0, N, ROWS, EVEN_N)
    whole = tl.load(side.whole + (rows >> SIDE[5]))
    RUN: tl.constexpr = SIDE[1]
    if COLUMNS != RUN:
        whole = whole[:, None]
    return scales, whole


@triton.jit
def scales_of_scales(loaded, side, state, SIDE: tl.constexpr):
    """Return the e4m3 scales of groups times the scale of the tensor or of the row."""
    return float_of_halves(e4m3_halves(loaded[0].to(tl.int32)), 256.0) * loaded[1]


# fmt: off
@triton.jit
def decode_bytes(
    words, scales, HALVES: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    words, scales = grouped(words, scales)
    values = join4(
        (float_of_halves(HALVES(words & 255), WEIGHT) * scales).to(DTYPE),
        (float_of_halves(HALVES((words >> 8) & 255), WEIGHT) * scales).to(DTYPE),
        (float_of_halves(HALVES((words >> 16) & 255), WEIGHT) * scales).to(DTYPE),
        (float_of_halves(HALVES((words >> 24) & 255), WEIGHT) * scales).to(DTYPE),
    )
    return tl.reshape(values, (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_e4m3(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    return decode_bytes(words, scales, e4m3_halves, 256.0, DTYPE, ROWS, COLUMNS)


# fmt: off
@triton.jit
def decode_e5m2(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    return decode_bytes(words, scales, e5m2_halves, 1.0, DTYPE, ROWS, COLUMNS)


@triton.jit
def e2m1_value(words, SHIFT: tl.constexpr, scales, DTYPE: tl.constexpr):
    return (float_of_halves(e2m1_halves(words >> SHIFT), 16384.0) * scales).to(DTYPE)


# fmt: off
@triton.jit
def decode_e2m1(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    words, scales = grouped(words, scales)
    values = join8(
        e2m1_value(words, 0, scales, DTYPE),
        e2m1_value(words, 4, scales, DTYPE),
        e2m1_value(words, 8, scales, DTYPE),
        e2m1_value(words, 12, scales, DTYPE),
        e2m1_value(words, 16, scales, DTYPE),
        e2m1_value(words, 20, scales, DTYPE),
        e2m1_value(words, 24, scales, DTYPE),
        e2m1_value(words, 28, scales, DTYPE),
    )
    return tl.reshape(values, (ROWS, COLUMNS))
