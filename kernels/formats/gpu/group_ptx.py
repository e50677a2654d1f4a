"""Decoders of formats in groups for NVIDIA's devices, by texts of `group_assembly`.

They implement `scale` and `decode` of `qlora_compile.kernels.gpu.decoders`; factors and words are
those of `groups`.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportAssignmentType=false
import triton
import triton.language as tl

from qlora_compile.kernels.formats.gpu.decode import grouped, join4, join8

_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def stored_factors(loaded, side, state, SIDE: tl.constexpr):
    """Return the scales as stored, and zeros, as int32 if all are whole, else as float32; minima
    are returned a second time."""
    CONSTANT: tl.constexpr = int(SIDE[2])
    ZEROS: tl.constexpr = SIDE[4]
    scales = loaded[0]
    if ZEROS == 2:
        minima = loaded[1].to(tl.float32)
        factors = (scales, minima, minima)
    elif ZEROS == 1:
        factors = (scales, loaded[1].to(tl.float32))
    elif side.zeros is None:
        factors = (scales, tl.full(scales.shape, CONSTANT, tl.int32))
    else:
        factors = (scales, loaded[1].to(tl.int32))
    return factors


@triton.jit
def twice(values):
    """Return float32 registers with the bits of 16-bit values in both halves."""
    bits = values.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (bits | (bits << 16)).to(tl.float32, bitcast=True)


# fmt: off
@triton.jit
def decode_nibbles(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode 4-bit codes. PROGRAM: texts for whole zeros, for other zeros, for minima, and for
    whole zeros with scales of DTYPE."""
    MINIMA: tl.constexpr = len(scales) == 3
    rows, zeros = grouped(words, scales[1])
    _, scales = grouped(words, scales[0])
    if MINIMA:
        TEXT: tl.constexpr = PROGRAM[2]
        scales = scales.to(tl.float32)
    elif zeros.dtype == tl.float32:
        TEXT: tl.constexpr = PROGRAM[1]
        scales = scales.to(tl.float32)
    elif scales.dtype == DTYPE:
        TEXT: tl.constexpr = PROGRAM[3]
        scales, zeros = twice(scales), twice((-zeros).to(tl.float32).to(DTYPE))
    else:
        TEXT: tl.constexpr = PROGRAM[0]
        scales, zeros = scales.to(tl.float32), zeros.to(tl.float32) + _MAGIC
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        TEXT, "=h,=h,=h,=h,=h,=h,=h,=h,r,f,f", [rows, scales, zeros],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True, pack=1,
    )  # fmt: skip
    bits = join8(w0, w1, w2, w3, w4, w5, w6, w7)
    return tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_bytes(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode 8-bit codes. PROGRAM: texts for whole zeros, for other zeros and for minima."""
    MINIMA: tl.constexpr = len(scales) == 3
    rows, zeros = grouped(words, scales[1])
    _, scales = grouped(words, scales[0].to(tl.float32))
    if MINIMA:
        TEXT: tl.constexpr = PROGRAM[2]
    elif zeros.dtype == tl.float32:
        TEXT: tl.constexpr = PROGRAM[1]
    else:
        TEXT: tl.constexpr = PROGRAM[0]
        zeros = zeros.to(tl.float32) + _MAGIC
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        TEXT, "=h,=h,=h,=h,r,f,f", [rows, scales, zeros],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return tl.reshape(join4(w0, w1, w2, w3).to(DTYPE, bitcast=True), (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_float_bytes(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode 8-bit floats, with float32 scales."""
    words, scales = grouped(words, scales)
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        PROGRAM[0], "=h,=h,=h,=h,r,f", [words, scales],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return tl.reshape(join4(w0, w1, w2, w3).to(DTYPE, bitcast=True), (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_e2m1(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by byte permutations from eight scaled magnitudes in four registers."""
    words, scales = grouped(words, scales)
    l0, l1, h0, h1 = tl.inline_asm_elementwise(
        PROGRAM[0], "=&r,=&r,=&r,=&r,f", [scales],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        PROGRAM[1], "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r", [words, l0, l1, h0, h1],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True, pack=1,
    )  # fmt: skip
    bits = join8(w0, w1, w2, w3, w4, w5, w6, w7)
    return tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS))
