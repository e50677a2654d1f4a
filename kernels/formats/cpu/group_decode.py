"""Decoding rows of groups in one pass, each with a scale and a zero of its own."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.toolchain import VECTORISED, compiled, has_compiler
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.formats.cpu.decode import ROUNDING, TYPES

NIBBLES, INTEGER, E4M3, E5M2 = "NIBBLES", "INTEGER", "E4M3", "E5M2"
"""Kinds of codes: any of 4 bits, unsigned integers and floats of 8."""

_NIBBLES = (
    VECTORISED
    + ROUNDING
    + r"""
#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Decode as many whole vectors and halves of vectors as `bytes` hold, all of one group, whose
// sixteen values are in `table`; return the bytes read.
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, __m512 table, bool streams, uint16_t* to) {
  const __m256i sixteen = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(table), 16));
  const __m512i twice = _mm512_broadcast_i64x4(sixteen);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512i byte = _mm512_cvtepu8_epi32(stored);
    // A permutation takes five bits of an index; the table is there twice.
    const __m512i index = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
    const __m512i weights = _mm512_permutexvar_epi16(index, twice);
    if (streams) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * i), weights);
    } else {
      _mm512_storeu_si512(to + 2 * i, weights);
    }
  }
  if (i + 8 <= bytes) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m256i byte = _mm256_cvtepu8_epi32(stored);
    const __m256i index = _mm256_or_si256(byte, _mm256_slli_epi32(byte, 12));
    const __m256i weights = _mm256_permutexvar_epi16(index, sixteen);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), weights);
    i += 8;
  }
  return i;
}
static inline int64_t decode(const uint8_t* in, int64_t bytes, __m512 table, bool, float* to) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512i byte = _mm512_cvtepu8_epi32(stored);
    const __m512 low = _mm512_permutexvar_ps(byte, table);
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
    _mm512_storeu_ps(to + 2 * i, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(to + 2 * i + 16, _mm512_permutex2var_ps(low, second, high));
  }
  if (i + 8 <= bytes) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m512i byte = _mm512_cvtepu8_epi32(stored);
    const __m512 low = _mm512_permutexvar_ps(byte, table);
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
    _mm512_storeu_ps(to + 2 * i, _mm512_permutex2var_ps(low, first, high));
    i += 8;
  }
  return i;
}
#elif defined(__AVX2__)
// Decode as many whole vectors as `bytes` hold; return the bytes read.
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, __m256 lower, __m256 upper, uint16_t* to) {
  const Sixteen values(lower, upper);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    values.look_up(stored, _mm_srli_epi16(stored, 4), to + 2 * i);
  }
  return i;
}
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, __m256 lower, __m256 upper, float* to) {
  const SixteenFloats values(lower, upper);
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m256i byte = _mm256_cvtepu8_epi32(stored);
    values.look_up(byte, _mm256_srli_epi32(byte, 4), to + 2 * i);
  }
  return i;
}
#endif

// The first weight of a group is the low half of a byte.
static inline void decode_group(
    const uint8_t* in, int64_t count, int64_t, const float* values, float zero, float scale,
    bool streams, TYPE* to) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(values), _mm512_set1_ps(zero));
  const __m512 table = _mm512_mul_ps(shifted, _mm512_set1_ps(scale));
  i = 2 * decode(in, count / 2, table, streams, to);
  if (i == count) return;
#elif defined(__AVX2__)
  const auto eight = [&](const float* from) {
    const __m256 shifted = _mm256_sub_ps(_mm256_loadu_ps(from), _mm256_set1_ps(zero));
    return _mm256_mul_ps(shifted, _mm256_set1_ps(scale));
  };
  i = 2 * decode(in, count / 2, eight(values), eight(values + 8), to);
  if (i == count) return;
#endif
  TYPE sixteen[16];
  for (int64_t j = 0; j < 16; ++j) store(sixteen + j, (values[j] - zero) * scale);
  for (; i < count; ++i) to[i] = sixteen[(in[i / 2] >> (i % 2 * 4)) & 15];
}
"""
)

_BYTES = (
    VECTORISED
    + ROUNDING
    + r"""
#if defined(__AVX512BW__) && defined(__AVX512VL__)
// The values of sixteen codes. An 8-bit float is a float16 with fewer bits: that of e5m2 as it is,
// that of e4m3, whose exponents are biased by 7 and not by 15, 2**8 times too small; its only NaN
// has all bits set.
static inline __m512 widened(__m128i codes, int64_t kind) {
  if (kind == INTEGER) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  const __m256i wide = _mm256_cvtepu8_epi16(codes);
  const __m256i upper = _mm256_slli_epi16(wide, 8);
  if (kind == E5M2) return _mm512_cvtph_ps(upper);
  const __m256i ones = _mm256_set1_epi16(0x7F);
  const __m256i size = _mm256_and_si256(wide, ones);
  const __m256i sign = _mm256_and_si256(upper, _mm256_set1_epi16(-0x8000));
  const __m512 half = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(size, 7)));
  const __m512 value = _mm512_mul_ps(half, _mm512_set1_ps(256.0f));
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
  return _mm512_mask_mov_ps(value, _mm256_cmpeq_epi16_mask(size, ones), nan);
}
#endif

static inline void decode_group(
    const uint8_t* in, int64_t count, int64_t kind, const float* values, float zero, float scale,
    bool, TYPE* to) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  for (; i + 16 <= count; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512 shifted = _mm512_sub_ps(widened(stored, kind), _mm512_set1_ps(zero));
    store(to + i, _mm512_mul_ps(shifted, _mm512_set1_ps(scale)));
  }
#endif
  if (kind == INTEGER) {
#pragma omp simd
    for (int64_t j = i; j < count; ++j) store(to + j, (static_cast<float>(in[j]) - zero) * scale);
    return;
  }
  for (; i < count; ++i) store(to + i, (values[in[i]] - zero) * scale);
}
"""
)

_KINDS = {INTEGER: 0, E4M3: 1, E5M2: 2}

FACTOR_TYPES = {"F32": 0, "BF16": 1, "U8": 2, "POWER": 3}
FACTOR_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}

FACTOR = r"""
static inline float factor(const uint8_t* factors, int64_t type, int64_t at) {
  if (type == F32) return reinterpret_cast<const float*>(factors)[at];
  if (type == BF16) return load(reinterpret_cast<const uint16_t*>(factors) + at);
  if (type == U8) return factors[at];
  // A power of two, whose byte is the bits of an exponent but for 2**-127 and NaN.
  const uint32_t byte = factors[at];
  const uint32_t bits = byte == 0 ? 0x00400000 : byte == 255 ? 0x7FC00000 : byte << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
"""
"""C++: reading one factor of a type in `FACTOR_TYPES`, at an index."""

_ROWS = (
    FACTOR
    + r"""
extern "C" void kernel(
    const uint8_t* codes, const float* values, const uint8_t* scales, const uint8_t* zeros,
    int64_t scale_type, int64_t zero_type, int64_t kind, int64_t zero_step, int64_t rows,
    int64_t columns, int64_t size, int64_t threads, TYPE* out) {
  const int64_t groups = (columns + size - 1) / size;
  const int64_t row_bytes = (columns * BITS + 7) / 8;
  // What no core's cache holds goes to memory without being read from there first.
  const bool lines = columns * sizeof(TYPE) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const bool streams = lines && rows * columns * sizeof(TYPE) > STREAMED;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size, at = r * groups + g;
      const int64_t count = columns - first < size ? columns - first : size;
      decode_group(
          codes + r * row_bytes + first * BITS / 8, count, kind, values,
          factor(zeros, zero_type, zero_step * at), factor(scales, scale_type, at), streams,
          out + r * columns + first);
    }
}
""".replace("STREAMED", str(4 << 20))
)


def writes(out: Tensor) -> bool:
    """Whether `write_rows` can write `out`."""
    return (
        out.device.type == "cpu"
        and out.numel() >= decode.SMALLEST
        and out.dtype in TYPES
        and has_compiler()
    )


def write_rows(
    codes: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    symmetric_zero: float,
    size: int,
    kind: str,
    out: Tensor,
) -> None:
    """out [rows, K] = (values[code] - zero) * scale, rounded once.

    kind: what codes are, NIBBLES of 4 bits, others of 8. codes: uint8 [rows, K] or, of 4 bits,
    [rows, ceil(K / 2)], contiguous as all of these tensors are. values: float32 [256] or [16].
    scales, zeros: [rows, groups], of groups of `size` columns, which begin with a byte; float32,
    bfloat16 or, of zeros, uint8 numbers, while scales of uint8 are e8m0, as in MXFP4. Without
    `zeros` every one is `symmetric_zero`. out: of a dtype in TYPES.
    """
    step = int(zeros is not None)
    if zeros is None:
        zeros = constant(symmetric_zero)
    rows, columns = out.shape
    power = scales.dtype == torch.uint8
    scale_type = FACTOR_TYPES["POWER" if power else FACTOR_NAMES[scales.dtype]]
    types = (scale_type, FACTOR_TYPES[FACTOR_NAMES[zeros.dtype]])
    sizes = (
        *types,
        _KINDS.get(kind, 0),
        step,
        rows,
        columns,
        min(size, columns),
        torch.get_num_threads(),
    )
    kernel = compiled(*_typed(kind == NIBBLES, out.dtype))
    kernel(codes, values, scales, zeros, *sizes, out)


@functools.cache
def constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=torch.float32, device="cpu")


@functools.cache
def _typed(nibbles: bool, dtype: torch.dtype) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    code = (_NIBBLES if nibbles else _BYTES) + _ROWS
    names = _KINDS | FACTOR_TYPES | {"TYPE": TYPES[dtype], "BITS": 4 if nibbles else 8}
    for name, meant in names.items():
        code = re.sub(rf"\b{name}\b", str(meant), code)
    pointers = ("const uint8_t*", "const float*", "const uint8_t*", "const uint8_t*")
    arguments = (*pointers, *["int64_t"] * 8, f"{TYPES[dtype]}*")
    return code, arguments
