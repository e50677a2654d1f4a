"""C++ that decodes the codes of one group: `decode_group`, for 4-bit and for 8-bit codes."""

from __future__ import annotations

from qlora_compile.kernels.cpu.toolchain import VECTORISED
from qlora_compile.kernels.formats.cpu.decode import ROUNDING

NIBBLES, INTEGER, E4M3, E5M2 = "NIBBLES", "INTEGER", "E4M3", "E5M2"
"""Kinds of codes: any 4-bit codes, unsigned 8-bit integers, and 8-bit floats."""

KINDS = {INTEGER: 0, E4M3: 1, E5M2: 2}

AFFINE = r"""
// A value, as (v - zero) * scale, or as v * scale + minimum.
static inline float affine(float value, float zero, float scale, bool adds) {
  return adds ? value * scale + zero : (value - zero) * scale;
}
"""

_AFFINE = (
    AFFINE
    + r"""
#if defined(__AVX512BW__)
static inline __m512 affine(__m512 value, __m512 zero, __m512 scale, bool adds) {
  if (adds) return _mm512_add_ps(_mm512_mul_ps(value, scale), zero);
  return _mm512_mul_ps(_mm512_sub_ps(value, zero), scale);
}
#endif
"""
)

FOUR_BITS = (
    VECTORISED
    + ROUNDING
    + _AFFINE
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
    store(to + 2 * i, weights, streams);
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
// Decode as many whole vectors and halves of vectors as `bytes` hold; return the bytes read.
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, __m256 lower, __m256 upper, uint16_t* to) {
  const Sixteen values(lower, upper);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    values.look_up(stored, _mm_srli_epi16(stored, 4), to + 2 * i);
  }
  if (i + 8 <= bytes) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    values.look_up(stored, _mm_srli_epi16(stored, 4), to + 2 * i, true);
    i += 8;
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
    bool adds, [[maybe_unused]] bool streams, TYPE* to) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
  const __m512 table = affine(_mm512_loadu_ps(values), zeros, scales, adds);
  i = 2 * decode(in, count / 2, table, streams, to);
  if (i == count) return;
#elif defined(__AVX2__)
  const auto eight = [&](const float* from) {
    const __m256 scales = _mm256_set1_ps(scale), zeros = _mm256_set1_ps(zero);
    const __m256 value = _mm256_loadu_ps(from);
    if (adds) return _mm256_add_ps(_mm256_mul_ps(value, scales), zeros);
    return _mm256_mul_ps(_mm256_sub_ps(value, zeros), scales);
  };
  i = 2 * decode(in, count / 2, eight(values), eight(values + 8), to);
  if (i == count) return;
#endif
  TYPE sixteen[16];
  for (int64_t j = 0; j < 16; ++j) store(sixteen + j, affine(values[j], zero, scale, adds));
  for (; i < count; ++i) to[i] = sixteen[(in[i / 2] >> (i % 2 * 4)) & 15];
}
"""
)

EIGHT_BITS = (
    VECTORISED
    + ROUNDING
    + _AFFINE
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
    bool adds, [[maybe_unused]] bool streams, TYPE* to) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  for (; i + 16 <= count; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
    store(to + i, affine(widened(stored, kind), zeros, scales, adds), streams);
  }
#endif
  if (kind == INTEGER) {
#pragma omp simd
    for (int64_t j = i; j < count; ++j)
      store(to + j, affine(static_cast<float>(in[j]), zero, scale, adds));
    return;
  }
  for (; i < count; ++i) store(to + i, affine(values[in[i]], zero, scale, adds));
}
"""
)
