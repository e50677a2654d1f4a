// What attention is computed from: operands as tiles, masks, exponentials.

#include <cmath>
#include <vector>

static constexpr float LOG2_E = 1.44269504f;

// Where the numbers of one head are: of the batch's entry, the head and the row.
struct Steps {
  int64_t batch, head, row;
  int64_t of(int64_t b, int64_t h) const { return b * batch + h * head; }
};

// 2^x within 4e-6; 0 where the result would be subnormal, as arithmetic with such numbers is slow;
// NaN stays NaN.
static inline __m512 exponential(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = x - whole;
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, whole);
}

// 16 x 16 numbers of 32 bits.
static inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD);
  }
}

// 32 columns of a row of d, from `column`; zeros past the last of `rows` and columns.
static inline __m512i row_of(const uint16_t* in, int64_t step, int64_t row, int64_t rows,
                             int64_t column, int64_t d) {
  if (row >= rows) return _mm512_setzero_si512();
  const int64_t inside = std::min<int64_t>(32, d - column);
  const __mmask32 mask = inside == 32 ? 0xFFFFFFFFu : (1u << inside) - 1;
  return _mm512_maskz_loadu_epi16(mask, in + row * step + column);
}

// t [rows, d] as tiles of tᵀ as a right operand, [d / 32][rows / 16][16 pairs][16][2].
static void pack_transposed(const uint16_t* t, int64_t step, int64_t rows, int64_t d,
                            uint16_t* out) {
  for (int64_t column = 0; column < d; column += 32)
    for (int64_t row = 0; row < ceil_div(rows, 32) * 32; row += TILE, out += TILE_SIZE) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = row_of(t, step, row + i, rows, column, d);
      transpose(block);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, block[i]);
    }
}

// t [rows, d] as tiles of a right operand, [rows / 32][d / 16][16 pairs][16][2].
static void pack_right(const uint16_t* t, int64_t step, int64_t rows, int64_t d, uint16_t* out) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t column = 0; column < d; column += 32, out += 2 * TILE_SIZE)
      for (int64_t i = 0; i < 32; i += 2)
        interleave(row_of(t, step, row + i, rows, column, d),
                   row_of(t, step, row + i + 1, rows, column, d), out + i * TILE,
                   out + i * TILE + TILE_SIZE);
}

// A left tile of tᵀ from the right tile of t.
static inline void transpose_tile(const uint16_t* in, uint16_t* out) {
  __m512i block[16];
  for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(in + i * 32);
  transpose(block);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, block[i]);
}

// `count` rows of t [rows, d], from `first`, d rounded up to 32, with zeros past the last ones.
static void pack_rows(const uint16_t* t, int64_t step, int64_t first, int64_t count, int64_t rows,
                      int64_t d, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < d; j += 32, out += 32)
      _mm512_storeu_si512(out, row_of(t, step, first + i, rows, j, d));
}

// t [rows, d], both multiples of 32, as left tiles of tᵀ, [d / 16][blocks of 32 rows].
static void transpose_rows(const uint16_t* t, int64_t rows, int64_t d, int64_t blocks,
                           uint16_t* out) {
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t j = 0; j < d; j += 32) {
      alignas(64) uint16_t pair[2 * TILE_SIZE];
      pack_right(t + i * d + j, d, 32, 32, pair);
      uint16_t* to = out + (j / TILE * blocks + i / 32) * TILE_SIZE;
      transpose_tile(pair, to);
      transpose_tile(pair + TILE_SIZE, to + blocks * TILE_SIZE);
    }
}

// The first `inside` of 16 sums, `scale` times each.
static void store_row(const float* sums, float scale, int64_t inside, uint16_t* to) {
  const __m512 row = _mm512_load_ps(sums) * scale;
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << inside) - 1),
                           narrow(row));
}

// Which keys count for a query, and how much.
struct Mask {
  const uint8_t* at;  // of numbers of `size` bytes, [queries, keys] of `step`; null: there is none
  int64_t size, step;
  bool causal;
  float scale;
  int64_t queries, keys;

  // What is added to the scores of 16 keys, from `key`, for one query.
  __m512 load(int64_t query, int64_t key) const {
    if (query >= queries) return _mm512_setzero_ps();
    const auto inside = static_cast<__mmask16>((1u << std::clamp<int64_t>(keys - key, 0, TILE)) - 1);
    const uint8_t* from = at + (query * step + key) * size;
    if (size == 4) return _mm512_maskz_loadu_ps(inside, from);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  // The same of 32 keys and 32 queries, as four tiles of [keys, queries].
  void load_tiles(int64_t key, int64_t query, __m512i* bias) const {
    for (int64_t part = 0; part < 4; ++part, bias += TILE) {
      for (int64_t i = 0; i < TILE; ++i)
        bias[i] = _mm512_castps_si512(load(query + part % 2 * TILE + i, key + part / 2 * TILE));
      transpose(bias);
    }
  }
};
