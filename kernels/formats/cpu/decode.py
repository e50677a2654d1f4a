"""Decoding whole blocks in one pass.

Torch's own operators take five passes through the caches: widen, look up, scale, round, copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.cpu.stores import past_caches
from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE
from qlora_compile.kernels.packed import PackedWeight

SMALLEST = 1 << 12
"""Decoding fewer weights does not repay the call."""

TYPES = {torch.bfloat16: "uint16_t", torch.float32: "float"}

ROUNDING = (
    BFLOAT16
    + r"""
// Whether parts of so many bytes, the first at `out`, begin and end with lines of the caches.
static inline bool whole_lines(int64_t bytes, const void* out) {
  return bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

#if defined(__AVX512BW__)
#include <immintrin.h>

// The upper halves are bfloat16.
static inline __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}
// `streams`: past the caches, to an aligned address.
static inline void store(uint16_t* out, __m512i values, bool streams) {
  __m512i* to = reinterpret_cast<__m512i*>(out);
  streams ? _mm512_stream_si512(to, values) : _mm512_storeu_si512(to, values);
}
static inline void store(uint16_t* out, __m512 values, bool streams) {
  const __m512i upper = _mm512_srli_epi32(rounded(values), 16);
  __m256i *to = reinterpret_cast<__m256i*>(out), half = _mm512_cvtepi32_epi16(upper);
  streams ? _mm256_stream_si256(to, half) : _mm256_storeu_si256(to, half);
}
static inline void store(float* out, __m512 values, bool) { _mm512_storeu_ps(out, values); }
#elif defined(__AVX2__)
#include <immintrin.h>

// Sixteen values rounded to bfloat16: one table of their lower bytes, and one of their upper.
struct Sixteen {
  __m128i lower, upper;

  Sixteen(__m256 first, __m256 second) {
    const __m256i pairs = _mm256_packus_epi32(rounded(first), rounded(second));
    const __m256i all = _mm256_permute4x64_epi64(pairs, 0xD8);
    lower = bytes(_mm256_and_si256(all, _mm256_set1_epi16(0xFF)));
    upper = bytes(_mm256_srli_epi16(all, 8));
  }

  // The values of 32 codes: the lower four bits of each byte of `first` and of `second`, in turn;
  // or only of the first 16.
  void look_up(__m128i first, __m128i second, uint16_t* to, bool half = false) const {
    const __m128i four_bits = _mm_set1_epi8(0xF);
    first = _mm_and_si128(first, four_bits);
    second = _mm_and_si128(second, four_bits);
    __m128i* out = reinterpret_cast<__m128i*>(to);
    const __m128i codes_of[] = {
        _mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
    for (const __m128i codes : codes_of) {
      const __m128i low = _mm_shuffle_epi8(lower, codes), high = _mm_shuffle_epi8(upper, codes);
      _mm_storeu_si128(out++, _mm_unpacklo_epi8(low, high));
      _mm_storeu_si128(out++, _mm_unpackhi_epi8(low, high));
      if (half) return;
    }
  }

  static __m256i rounded(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  }
  static __m128i bytes(__m256i words) {
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

// The same in float32.
struct SixteenFloats {
  __m256 lower, upper;

  SixteenFloats(__m256 first, __m256 second) : lower(first), upper(second) {}

  // The values of 16 codes: the lower four bits of each word of `first` and of `second`, in turn.
  void look_up(__m256i first, __m256i second, float* to) const {
    const __m256 a = values(first), b = values(second);
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(even, odd, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(even, odd, 0x31));
  }

  // A permutation takes a code's three lowest bits; the fourth chooses the half.
  __m256 values(__m256i code) const {
    const __m256 takes_upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, code),
                            _mm256_permutevar8x32_ps(upper, code), takes_upper);
  }
};
#endif
"""
)

_CODEBOOK = (
    ROUNDING
    + r"""
#if defined(__AVX512BW__)
// Decode as many whole vectors as `bytes` of one block hold; return the bytes read. A permutation
// takes as many of an index's bits as its table needs and ignores the others.
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, const float* codebook, float scale, bool streams,
    uint16_t* to) {
  // The block's sixteen values are scaled and rounded once, not each weight.
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
  const __m256i sixteen = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(values), 16));
  const __m512i table = _mm512_broadcast_i64x4(sixteen);
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512i byte = _mm512_cvtepu8_epi32(stored);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    const __m512i weights = _mm512_permutexvar_epi16(index, table);
    store(to + 2 * i, weights, streams);
  }
  return i;
}
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, const float* codebook, float scale, bool, float* to) {
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m512i byte = _mm512_cvtepu8_epi32(stored);
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
    const __m512 low = _mm512_permutexvar_ps(byte, table);
    _mm512_storeu_ps(to + 2 * i, _mm512_permutex2var_ps(high, first, low));
    _mm512_storeu_ps(to + 2 * i + 16, _mm512_permutex2var_ps(high, second, low));
  }
  return i;
}
#elif defined(__AVX2__)
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, const float* codebook, float scale, bool, uint16_t* to) {
  // The block's sixteen values are scaled and rounded once, not each weight.
  const __m256 scales = _mm256_set1_ps(scale);
  const Sixteen values(_mm256_mul_ps(_mm256_loadu_ps(codebook), scales),
                       _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scales));
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    values.look_up(_mm_srli_epi16(stored, 4), stored, to + 2 * i);
  }
  return i;
}
static inline int64_t decode(
    const uint8_t* in, int64_t bytes, const float* codebook, float scale, bool, float* to) {
  const __m256 scales = _mm256_set1_ps(scale);
  const SixteenFloats values(_mm256_mul_ps(_mm256_loadu_ps(codebook), scales),
                             _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scales));
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m256i byte = _mm256_cvtepu8_epi32(stored);
    values.look_up(_mm256_srli_epi32(byte, 4), byte, to + 2 * i);
  }
  return i;
}
#endif

extern "C" void kernel(
    const uint8_t* codes, const float* codebook, const uint8_t* absmax,
    const float* nested_codebook, const float* nested_absmax, const float* nested_offset,
    int64_t nested, int64_t first_block, int64_t blocks, int64_t bytes, int64_t past_caches,
    int64_t threads, TYPE* out) {
  [[maybe_unused]] const bool streams =
      past_caches && whole_lines(2 * bytes * sizeof(TYPE), out);
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t block = first_block + b;
    float scale;
    if (nested) {
      const float product = nested_codebook[absmax[block]] * nested_absmax[block / NESTED];
      scale = product + *nested_offset;
    } else {
      scale = reinterpret_cast<const float*>(absmax)[block];
    }
    const uint8_t* in = codes + block * bytes;
    TYPE* to = out + 2 * b * bytes;
    int64_t i = 0;
#if defined(__AVX512BW__) || defined(__AVX2__)
    i = decode(in, bytes, codebook, scale, streams, to);
#endif
    for (; i < bytes; ++i) {
      store(to + 2 * i, codebook[in[i] >> 4] * scale);
      store(to + 2 * i + 1, codebook[in[i] & 0xF] * scale);
    }
  }
}
""".replace("NESTED", str(NESTED_BLOCK_SIZE))
)

_INTEGERS = (
    VECTORISED
    + ROUNDING
    + r"""
extern "C" void kernel(
    const int8_t* codes, const float* scales, int64_t blocks, int64_t size, int64_t past_caches,
    int64_t threads, TYPE* out) {
  [[maybe_unused]] const bool streams = past_caches && whole_lines(size * sizeof(TYPE), out);
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const float scale = scales[b];
    const int8_t* in = codes + b * size;
    TYPE* to = out + b * size;
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 16 <= size; i += 16) {
      const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(stored));
      store(to + i, _mm512_mul_ps(values, _mm512_set1_ps(scale)), streams);
    }
#endif
#pragma omp simd
    for (int64_t j = i; j < size; ++j) {
      store(to + j, static_cast<float>(in[j]) * scale);
    }
  }
}
"""
)


def writes(out: Tensor, block_size: int) -> bool:
    """Whether the functions below can write whole blocks of `out` [elements]."""
    return (
        out.device.type == "cpu"
        and out.numel() >= max(SMALLEST, block_size)
        and out.dtype in TYPES
        and has_compiler()
    )


def write_codebook(packed: PackedWeight, codebook: Tensor, first: int, out: Tensor) -> None:
    """Decode blocks `first` … of a 4-bit weight to `out`, contiguous and of whole blocks; the first
    begins a byte. codebook: float32 [16]."""
    block_size = packed.layout.named["block_size"]
    bytes_per_block = block_size // 2
    codes, absmax, *nested = (each.contiguous() for each in packed.tensors)
    # A tensor that is not read must be given all the same.
    tables = nested or [codebook] * 3
    blocks, streams = out.numel() // block_size, int(past_caches(out))
    sizes = (int(bool(nested)), first, blocks, bytes_per_block, streams)
    kernel = _kernel(_CODEBOOK, ("uint8_t", "float", "uint8_t", *["float"] * 3), 6, out.dtype)
    kernel(codes, codebook, absmax, *tables, *sizes, torch.get_num_threads(), out)


def write_integers(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write out = codes * scales: int8 codes and contiguous `out` of [blocks * size], float32
    scales [blocks]."""
    kernel = _kernel(_INTEGERS, ("int8_t", "float"), 4, out.dtype)
    blocks, streams = scales.numel(), int(past_caches(out))
    kernel(codes, scales, blocks, out.numel() // blocks, streams, torch.get_num_threads(), out)


def _kernel(
    source: str, inputs: tuple[str, ...], sizes: int, dtype: torch.dtype
) -> Callable[..., Any]:
    return compiled(*_typed(source, inputs, sizes, dtype))


@functools.cache
def _typed(
    source: str, inputs: tuple[str, ...], sizes: int, dtype: torch.dtype
) -> tuple[str, tuple[str, ...]]:
    """Return the source for results of `dtype`, and the types of its arguments."""
    arguments = [f"const {each}*" for each in inputs] + ["int64_t"] * sizes
    code = source.replace("TYPE", TYPES[dtype])
    return code, (*arguments, f"{TYPES[dtype]}*")
