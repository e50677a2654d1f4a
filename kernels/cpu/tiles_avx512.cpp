// Products of tiles by AVX-512.

struct Tiles {};

// As many sums as registers hold: of 8 rows and two tiles side by side.
static inline void multiply_rows(const uint16_t* left, int64_t ld, int64_t left_step,
                                 const uint16_t* right, int64_t right_step, int64_t steps,
                                 float* sums, bool adds) {
  constexpr int ROWS = 8;
  __m512 first[ROWS], second[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    first[i] = adds ? _mm512_load_ps(sums + i * TILE) : _mm512_setzero_ps();
    second[i] = adds ? _mm512_load_ps(sums + SUMS + i * TILE) : _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step, left += left_step, right += right_step)
    for (int64_t j = 0; j < TILE; ++j) {
      const __m512i columns = _mm512_load_si512(right + j * 32);
      const __m512i others = _mm512_load_si512(right + TILE_SIZE + j * 32);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        int32_t pair;
        std::memcpy(&pair, left + i * ld + 2 * j, sizeof(pair));
        const __m512i both = _mm512_set1_epi32(pair);
        first[i] = add_products(first[i], both, columns);
        second[i] = add_products(second[i], both, others);
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    _mm512_store_ps(sums + i * TILE, first[i]);
    _mm512_store_ps(sums + SUMS + i * TILE, second[i]);
  }
}

// Sums of 32 x 32, in rows of two tiles from `first` and `second`, = left [32, steps * 32] right
// [steps * 32, 32], or += if it `adds`.
static inline void multiply(const uint16_t* left, int64_t ld, int64_t left_step,
                            int64_t left_second, const uint16_t* right, int64_t right_step,
                            int64_t steps, float* first, float* second, bool adds) {
  for (int64_t i = 0; i < TILE; i += 8) {
    multiply_rows(left + i * ld, ld, left_step, right, right_step, steps, first + i * TILE, adds);
    multiply_rows(left + left_second + i * ld, ld, left_step, right, right_step, steps,
                  second + i * TILE, adds);
  }
}
