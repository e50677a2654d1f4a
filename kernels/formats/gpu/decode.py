"""Decoders on the device: tiles of packed words to tiles of weights, exact to the last bit.

They implement `decode` and `prepare` of `qlora_compile.kernels.gpu.decoders`. The scales are
float32 [ROWS, G], one per run of COLUMNS / G weights of a row, or [ROWS] for G = 1; the state is
the offset of doubly quantised absmax, and what the decoder itself keeps.
"""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from qlora_compile.kernels.formats.gpu.absmax import loaded_offset


@triton.jit
def join8(w0, w1, w2, w3, w4, w5, w6, w7):
    """Return [..., 2, 2, 2] whose row-major flattening is w0 … w7."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd)


@triton.jit
def join4(w0, w1, w2, w3):
    """Return [..., 2, 2] whose row-major flattening is w0 … w3."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def grouped(words, scales):
    """Return `words` with one row for each scale, and the scales as a column."""
    if len(scales.shape) == 1:
        scales = scales[:, None]
    else:
        ROWS: tl.constexpr = scales.shape[0] * scales.shape[1]
        WORDS: tl.constexpr = words.shape[0] * words.shape[1] // ROWS
        words = tl.reshape(words, (ROWS, WORDS))
        scales = tl.reshape(scales, (ROWS, 1))
    return words, scales


@triton.jit
def prepare_nothing(side, SIDE: tl.constexpr, PROGRAM: tl.constexpr):
    return loaded_offset(side), 0


@triton.jit
def prepare_pointer(side, SIDE: tl.constexpr, PROGRAM: tl.constexpr):
    return loaded_offset(side), side.tables


@triton.jit
def prepare_lane_table(side, SIDE: tl.constexpr, PROGRAM: tl.constexpr):
    """Return tables[lane % 16] in every lane's register: a scalar that differs between the
    lanes."""
    lane_table = tl.inline_asm_elementwise(
        PROGRAM[0], "=r,l", [side.tables.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )
    return loaded_offset(side), lane_table


@triton.jit
def codebook_value(words, SHIFT: tl.constexpr, tables, scales, DTYPE: tl.constexpr):
    return (tl.load(tables + ((words >> SHIFT) & 15)) * scales).to(DTYPE)


# fmt: off
@triton.jit
def decode_codebook(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by plain Triton, on every target, with sixteen values in global memory."""
    tables = state[1]
    words, scales = grouped(words, scales)
    values = join8(
        codebook_value(words, 4, tables, scales, DTYPE),
        codebook_value(words, 0, tables, scales, DTYPE),
        codebook_value(words, 12, tables, scales, DTYPE),
        codebook_value(words, 8, tables, scales, DTYPE),
        codebook_value(words, 20, tables, scales, DTYPE),
        codebook_value(words, 16, tables, scales, DTYPE),
        codebook_value(words, 28, tables, scales, DTYPE),
        codebook_value(words, 24, tables, scales, DTYPE),
    )
    return tl.reshape(values, (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_codebook_prmt(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by byte permutations from sixteen scaled values in eight registers."""
    words, scales = grouped(words, scales)
    l0, l1, l2, l3, h0, h1, h2, h3 = tl.inline_asm_elementwise(
        PROGRAM[0],
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f",
        [scales],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        PROGRAM[1],
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
        [words, l0, l1, l2, l3, h0, h1, h2, h3],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    bits = join8(w0, w1, w2, w3, w4, w5, w6, w7)
    return tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_codebook_shfl(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by shuffles from sixteen values in the registers of sixteen lanes."""
    words, scales = grouped(words, scales)
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        PROGRAM[1],
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,f",
        [words, state[1], scales],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    bits = join8(w0, w1, w2, w3, w4, w5, w6, w7)
    return tl.reshape(bits.to(DTYPE, bitcast=True), (ROWS, COLUMNS))


@triton.jit
def int8_value(words, SHIFT: tl.constexpr, scales, DTYPE: tl.constexpr):
    return (((words << (24 - SHIFT)) >> 24).to(tl.float32) * scales).to(DTYPE)


# fmt: off
@triton.jit
def decode_int8(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode by plain Triton, on every target."""
    words, scales = grouped(words, scales)
    values = join4(
        int8_value(words, 0, scales, DTYPE),
        int8_value(words, 8, scales, DTYPE),
        int8_value(words, 16, scales, DTYPE),
        int8_value(words, 24, scales, DTYPE),
    )
    return tl.reshape(values, (ROWS, COLUMNS))


# fmt: off
@triton.jit
def decode_int8_prmt(
    words, scales, state, PROGRAM: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """Decode without conversion instructions: bytes become the low mantissa bits of 2**23."""
    words, scales = grouped(words, scales)
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        PROGRAM[0],
        "=h,=h,=h,=h,r,f",
        [words, scales],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    return tl.reshape(join4(w0, w1, w2, w3).to(DTYPE, bitcast=True), (ROWS, COLUMNS))
