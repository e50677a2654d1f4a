// Tiles of 16 rows of 64 bytes, and how operands become such.

#include <immintrin.h>

#include <algorithm>

static constexpr int64_t TILE = 16;
static constexpr int64_t TILE_SIZE = 512;     // bfloat16 numbers of a tile
static constexpr int64_t SUMS = TILE * TILE;  // float32 numbers of a tile
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sum + the products of pairs of bfloat16 numbers, one of each pair after the other.
static inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  const auto low = [](__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); };
  const auto high = [&](__m512i pair) { return _mm512_castsi512_ps(pair & upper); };
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
#endif
}

// Numbers rounded to bfloat16.
static inline __m256i narrow(__m512 value) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_srli_epi32(bits, 16) & _mm512_set1_epi32(1);
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
#endif
}
static inline __m512i narrow(__m512 first, __m512 second) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(first)), narrow(second), 1);
#endif
}

// Two rows of 32 bfloat16 numbers side by side, as one row of two right tiles.
static inline void interleave(__m512i even, __m512i odd, uint16_t* first, uint16_t* second) {
  alignas(64) static constexpr int16_t ORDER[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(ORDER);
  const __m512i rest = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, order, odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, rest, odd));
}
