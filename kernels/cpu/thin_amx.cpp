// Products of bfloat16 rows with an adapter's float32 factor, accumulated in float32. A float32
// number is the sum of three bfloat16 ones, so that AMX loses nothing of it (Henry, Tang and
// Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations").

#include <vector>

// The bits of a float32 rounded to bfloat16, in their upper half; what is left of the value.
static inline uint32_t take(float& value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  float taken;
  std::memcpy(&taken, &bits, sizeof(taken));
  value -= taken;
  return bits;
}

// 16 columns, from `first`, of rows i … i + 31 of tᵀ, t [rank, k], as tiles of a right operand:
// [part][16 pairs of rows][16][2].
static void pack_right(const float* t, int64_t first, int64_t rank, int64_t i, int64_t k,
                       int64_t step, int64_t step_k, uint16_t* out) {
  float values[32][TILE] = {};
  const int64_t rows = std::min<int64_t>(32, k - i), columns = std::min(TILE, rank - first);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < columns; ++c) values[j][c] = t[(first + c) * step + (i + j) * step_k];
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t j = 0; j < 16; ++j)
#pragma omp simd
    for (int64_t c = 0; c < TILE; ++c) {
      float even = values[2 * j][c], odd = values[2 * j + 1][c];
      uint32_t* to = pairs + j * TILE + c;
      to[0] = take(even) >> 16 | take(odd);
      to[TILE_SIZE / 2] = take(even) >> 16 | take(odd);
      to[TILE_SIZE] = take(even) >> 16 | take(odd);
    }
}

static void product(const uint16_t* x, int64_t ldx, int64_t m, int64_t k, const float* t,
                        int64_t rank, int64_t step, int64_t step_k, float* out, int64_t ld_out,
                        float scale, int64_t threads) {
  const int64_t groups = ceil_div(rank, TILE), blocks = ceil_div(k, 32);
#pragma omp parallel num_threads(threads)
  {
    // Every thread for itself: another core's would have to be fetched from there.
    static thread_local std::vector<uint16_t> packed;
    packed.resize(blocks * groups * 3 * TILE_SIZE);
    uint16_t* right = packed.data();
    for (int64_t i = 0; i < blocks * groups; ++i) {
      const int64_t first = i % groups * TILE, row = i / groups * 32;
      pack_right(t, first, rank, row, k, step, step_k, right + i * 3 * TILE_SIZE);
    }
    Tiles tiles;
    alignas(64) uint16_t edge[32 * 32];
    alignas(64) float sum[4 * TILE * TILE];
#pragma omp for
    for (int64_t row = 0; row < ceil_div(m, 32) * 32; row += 32)
      for (int64_t group = 0; group < groups; ++group) {
        clear();
        const int64_t rows = std::min<int64_t>(32, m - row);
        for (int64_t block = 0; block < blocks; ++block) {
          const uint16_t* left = x + row * ldx + block * 32;
          int64_t stride = ldx;
          const int64_t columns = std::min<int64_t>(32, k - block * 32);
          if (rows < 32 || columns < 32) {
            std::memset(edge, 0, sizeof(edge));
            for (int64_t i = 0; i < rows; ++i) std::memcpy(edge + i * 32, left + i * ldx, columns * 2);
            left = edge;
            stride = 32;
          }
          barrier();
          const uint16_t* tile = right + (block * groups + group) * 3 * TILE_SIZE;
          _tile_loadd(4, left, stride * 2);
          _tile_loadd(5, left + 16 * stride, stride * 2);
          _tile_loadd(6, tile, 64);
          _tile_loadd(7, tile + TILE_SIZE, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(6, tile + 2 * TILE_SIZE, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
          _tile_dpbf16ps(2, 4, 6);
          _tile_dpbf16ps(3, 5, 6);
        }
        // Tiles 2 and 3 have the smaller parts' products, which need not wait for the others'.
        stored(sum);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < std::min(TILE, rank - group * TILE); ++c) {
            const float* at = sum + i * TILE + c;
            out[(row + i) * ld_out + group * TILE + c] = (at[0] + at[2 * TILE * TILE]) * scale;
          }
      }
  }
}

// 16 columns, from `first`, of rows i … i + 31 of low [m, rank], transposed, as tiles of a left
// operand: [part][16][32].
static void pack_left(const float* low, int64_t first, int64_t rank, int64_t i, int64_t m,
                      int64_t ld, uint16_t* out) {
  float values[TILE][32] = {};
  const int64_t rows = std::min<int64_t>(32, m - i), columns = std::min(TILE, rank - first);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < columns; ++c) values[c][j] = low[(i + j) * ld + first + c];
  for (int64_t c = 0; c < TILE; ++c)
#pragma omp simd
    for (int64_t j = 0; j < 32; ++j) {
      float value = values[c][j];
      uint16_t* to = out + c * 32 + j;
      to[0] = take(value) >> 16;
      to[TILE_SIZE] = take(value) >> 16;
      to[2 * TILE_SIZE] = take(value) >> 16;
    }
}

// 64 columns of rows i, i + 1 of x [m, k] side by side, as one row of four right tiles.
static inline void interleave_rows(const uint16_t* in, int64_t ld, const __mmask32* masks,
                                   uint16_t* to) {
  for (int half = 0; half < 2; ++half) {
    const __m512i even = _mm512_maskz_loadu_epi16(masks[half], in + half * 32);
    const __m512i odd = _mm512_maskz_loadu_epi16(masks[2 + half], in + ld + half * 32);
    uint16_t* tile = to + half * 2 * TILE_SIZE;
    interleave(even, odd, tile, tile + TILE_SIZE);
  }
}

static void gradient(const uint16_t* x, int64_t ldx, int64_t m, int64_t k, const float* low,
                     int64_t ld, int64_t rank, float* out, int64_t step, int64_t step_k,
                     int64_t threads) {
  const int64_t groups = ceil_div(rank, TILE), blocks = ceil_div(m, 32);
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<uint16_t> packed, columns;
    packed.resize(blocks * groups * 3 * TILE_SIZE);
    columns.resize(blocks * 4 * TILE_SIZE);
    for (int64_t i = 0; i < blocks * groups; ++i)
      pack_left(low, i % groups * TILE, rank, i / groups * 32, m, ld,
                packed.data() + i * 3 * TILE_SIZE);
    Tiles tiles;
    alignas(64) float sum[4 * TILE * TILE];
#pragma omp for
    for (int64_t column = 0; column < ceil_div(k, 64) * 64; column += 64) {
      const int64_t width = std::min<int64_t>(64, k - column);
      const uint64_t inside = width == 64 ? ~0ull : (1ull << width) - 1;
      const auto lower = static_cast<__mmask32>(inside), upper = static_cast<__mmask32>(inside >> 32);
      const auto pack = [&](int64_t block) {
        for (int64_t i = block * 32; i < block * 32 + 32; i += 2) {
          // Rows past the last one count as zeros and are not read.
          const __mmask32 masks[] = {i < m ? lower : 0, i < m ? upper : 0, i + 1 < m ? lower : 0,
                                     i + 1 < m ? upper : 0};
          uint16_t* to = columns.data() + block * 4 * TILE_SIZE + i % 32 / 2 * 32;
          interleave_rows(x + std::min(i, m - 1) * ldx + column, i + 1 < m ? ldx : 0, masks, to);
        }
      };
      pack(0);
      for (int64_t group = 0; group < groups; ++group) {
        clear();
        for (int64_t block = 0; block < blocks; ++block) {
          // Ahead of its use: tiles are not loaded from stores under way.
          if (group == 0 && block + 1 < blocks) pack(block + 1);
          const uint16_t* right = columns.data() + block * 4 * TILE_SIZE;
          const uint16_t* left = packed.data() + (block * groups + group) * 3 * TILE_SIZE;
          barrier();
          for (int part = 0; part < 3; ++part) {
            _tile_loadd(4, left + part * TILE_SIZE, 64);
            _tile_loadd(5, right, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, right + TILE_SIZE, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, right + 2 * TILE_SIZE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, right + 3 * TILE_SIZE, 64);
            _tile_dpbf16ps(3, 4, 5);
          }
        }
        stored(sum);
        for (int64_t c = 0; c < std::min(TILE, rank - group * TILE); ++c)
          for (int64_t j = 0; j < width; ++j)
            out[(group * TILE + c) * step + (column + j) * step_k] =
                sum[j / TILE * TILE * TILE + c * TILE + j % TILE];
      }
    }
  }
}

// Rows i … i + 15 of low [m, rank], columns from `first`, as a left tile: 16 high parts and 16 low
// ones a row.
static void pack_rows(const float* low, int64_t first, int64_t rank, int64_t i, int64_t m,
                      int64_t ld, uint16_t* out) {
  const int64_t rows = std::min(TILE, m - i), columns = std::min(TILE, rank - first);
  std::memset(out, 0, TILE_SIZE * sizeof(*out));
  for (int64_t j = 0; j < rows; ++j)
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      float value = low[(i + j) * ld + first + c];
      out[j * 32 + c] = take(value) >> 16;
      out[j * 32 + TILE + c] = take(value) >> 16;
    }
}

// 16 rows, from `first`, of t [rank, n], columns j … j + 15, as two right tiles: the high parts
// twice, then the low ones. Times the tile above they give all but 2^-17 of the product.
static void pack_columns(const float* t, int64_t first, int64_t rank, int64_t j, int64_t n,
                         int64_t step, int64_t step_n, uint16_t* out) {
  float values[TILE][TILE] = {};
  const int64_t rows = std::min(TILE, rank - first), columns = std::min(TILE, n - j);
  for (int64_t c = 0; c < rows; ++c)
    for (int64_t i = 0; i < columns; ++i) values[c][i] = t[(first + c) * step + (j + i) * step_n];
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t c = 0; c < TILE / 2; ++c)
#pragma omp simd
    for (int64_t i = 0; i < TILE; ++i) {
      float even = values[2 * c][i], odd = values[2 * c + 1][i];
      const uint32_t high = take(even) >> 16 | take(odd), low = take(even) >> 16 | take(odd);
      uint32_t* to = pairs + c * TILE + i;
      to[0] = to[TILE_SIZE / 4] = high;
      to[TILE_SIZE / 2] = to[TILE_SIZE * 3 / 4] = low;
    }
}

static inline void add_row(uint16_t* y, const float* sums, __mmask32 mask) {
  const __m512i in = _mm512_maskz_loadu_epi16(mask, y);
  const auto wide = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  const __m512 first = wide(_mm512_castsi512_si256(in)) + _mm512_load_ps(sums);
  const __m512 second = wide(_mm512_extracti64x4_epi64(in, 1)) + _mm512_load_ps(sums + TILE * TILE);
  _mm512_mask_storeu_epi16(y, mask, narrow(first, second));
}

static void add(uint16_t* y, int64_t ldy, int64_t m, int64_t n, const float* low, int64_t ld,
                int64_t rank, const float* t, int64_t step, int64_t step_n, int64_t threads) {
  const int64_t groups = ceil_div(rank, TILE), columns = ceil_div(n, 32) * 2;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<uint16_t> packed, lefts;
    packed.resize(columns * groups * 2 * TILE_SIZE);
    lefts.resize(groups * 2 * TILE_SIZE);
    for (int64_t i = 0; i < columns * groups; ++i)
      pack_columns(t, i % groups * TILE, rank, i / groups * TILE, n, step, step_n,
                   packed.data() + i * 2 * TILE_SIZE);
    Tiles tiles;
    alignas(64) float sum[4 * TILE * TILE];
#pragma omp for
    for (int64_t row = 0; row < ceil_div(m, 32) * 32; row += 32) {
      for (int64_t i = 0; i < groups * 2; ++i)
        pack_rows(low, i / 2 * TILE, rank, row + i % 2 * TILE, m, ld, lefts.data() + i * TILE_SIZE);
      for (int64_t column = 0; column < n; column += 32) {
        clear();
        for (int64_t group = 0; group < groups; ++group) {
          const uint16_t* left = lefts.data() + group * 2 * TILE_SIZE;
          const uint16_t* right = packed.data() + (column / TILE * groups + group) * 2 * TILE_SIZE;
          barrier();
          _tile_loadd(4, left, 64);
          _tile_loadd(5, left + TILE_SIZE, 64);
          for (int part = 0; part < 2; ++part) {
            _tile_loadd(6, right + part * TILE_SIZE, 64);
            _tile_loadd(7, right + (groups * 2 + part) * TILE_SIZE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
        stored(sum);
        const int64_t width = n - column;
        const __mmask32 mask = width >= 32 ? 0xFFFFFFFFu : (1u << width) - 1;
        for (int64_t i = 0; i < std::min<int64_t>(32, m - row); ++i)
          add_row(y + (row + i) * ldy + column, sum + i / TILE * 2 * TILE * TILE + i % TILE * TILE,
                  mask);
      }
    }
  }
}
