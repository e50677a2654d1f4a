// Products of rows of some Number with an adapter's float32 factor, in float32. Rows are widened in
// the cache, a few of them at a time, so that no float32 copy of an activation goes through memory.

static constexpr int64_t GROUP = 16;  // ranks that are multiplied together

// x [rows, columns] in float32 as [height, width], with zeros beside it.
static inline void widen(const Number* x, int64_t ld, int64_t rows, int64_t columns,
                         int64_t height, int64_t width, float* out) {
  for (int64_t i = 0; i < height; ++i, x += ld, out += width) {
    const int64_t inside = i < rows ? columns : 0;
    int64_t j = 0;
    for (; j + LANES <= inside; j += LANES) store_vector(out + j, load_vector(x + j));
    for (; j < inside; ++j) out[j] = load(x + j);
    for (; j < width; ++j) out[j] = 0.0f;
  }
}

// t [rows, columns], of any two steps, as [columns / width][rows][width], with zeros past the last.
static void pack(const float* t, int64_t rows, int64_t columns, int64_t step, int64_t step_column,
                 int64_t width, float* out) {
  for (int64_t first = 0; first < columns; first += width)
    for (int64_t i = 0; i < rows; ++i, out += width) {
      const float* from = t + i * step + first * step_column;
      const int64_t inside = std::min(width, columns - first);
      for (int64_t j = 0; j < inside; ++j) out[j] = from[j * step_column];
      for (int64_t j = inside; j < width; ++j) out[j] = 0.0f;
    }
}

static float* resized(std::vector<float>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

static void product(const Number* x, int64_t ldx, int64_t m, int64_t k, const float* t,
                    int64_t rank, int64_t step, int64_t step_k, float* out, int64_t ld_out,
                    float scale, int64_t threads) {
  // As many sums as registers hold.
  constexpr int64_t VECTORS = GROUP / LANES, ROWS = 12 / VECTORS, CHUNK = 256;
  const int64_t groups = ceil_div(rank, GROUP);
#pragma omp parallel num_threads(threads)
  {
    // Every thread for itself: another core's would have to be fetched from there.
    static thread_local std::vector<float> packed, partial;
    float* const factor = resized(packed, groups * k * GROUP);
    float* const sums = resized(partial, groups * ROWS * GROUP);
    pack(t, k, rank, step_k, step, GROUP, factor);
    alignas(64) float wide[ROWS * CHUNK];
#pragma omp for
    for (int64_t row = 0; row < m; row += ROWS) {
      const int64_t rows = std::min(ROWS, m - row);
      std::fill(sums, sums + groups * ROWS * GROUP, 0.0f);
      for (int64_t first = 0; first < k; first += CHUNK) {
        const int64_t width = std::min(CHUNK, k - first);
        widen(x + row * ldx + first, ldx, rows, width, ROWS, CHUNK, wide);
        for (int64_t group = 0; group < groups; ++group) {
          const float* right = factor + (group * k + first) * GROUP;
          float* const to = sums + group * ROWS * GROUP;
          Vector sum[ROWS][VECTORS];
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t v = 0; v < VECTORS; ++v)
              sum[i][v] = load_vector(to + i * GROUP + v * LANES);
          for (int64_t j = 0; j < width; ++j, right += GROUP) {
            Vector columns[VECTORS];
            for (int64_t v = 0; v < VECTORS; ++v) columns[v] = load_vector(right + v * LANES);
#pragma GCC unroll 12
            for (int64_t i = 0; i < ROWS; ++i)
              for (int64_t v = 0; v < VECTORS; ++v)
                sum[i][v] = multiply_add(vector_of(wide[i * CHUNK + j]), columns[v], sum[i][v]);
          }
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t v = 0; v < VECTORS; ++v)
              store_vector(to + i * GROUP + v * LANES, sum[i][v]);
        }
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < rank; ++c)
          out[(row + i) * ld_out + c] = sums[(c / GROUP * ROWS + i) * GROUP + c % GROUP] * scale;
    }
  }
}

static void gradient(const Number* x, int64_t ldx, int64_t m, int64_t k, const float* low,
                     int64_t ld, int64_t rank, float* out, int64_t step, int64_t step_k,
                     int64_t threads) {
  constexpr int64_t VECTORS = LANES == 16 ? 2 : 3, RANKS = LANES / 2, CHUNK = 64;
  constexpr int64_t PART = VECTORS * LANES, COLUMNS = 2 * PART;
  const int64_t groups = ceil_div(rank, RANKS);
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> packed, partial;
    float* const factor = resized(packed, groups * m * RANKS);
    float* const sums = resized(partial, groups * RANKS * COLUMNS);
    pack(low, m, rank, ld, 1, RANKS, factor);
    alignas(64) float wide[CHUNK * COLUMNS];
#pragma omp for
    for (int64_t column = 0; column < k; column += COLUMNS) {
      const int64_t width = std::min(COLUMNS, k - column);
      std::fill(sums, sums + groups * RANKS * COLUMNS, 0.0f);
      for (int64_t first = 0; first < m; first += CHUNK) {
        const int64_t rows = std::min(CHUNK, m - first);
        widen(x + first * ldx + column, ldx, rows, width, rows, COLUMNS, wide);
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t part = 0; part < width; part += PART) {
            const float* left = factor + (group * m + first) * RANKS;
            const float* right = wide + part;
            float* const to = sums + group * RANKS * COLUMNS + part;
            Vector sum[RANKS][VECTORS];
            for (int64_t c = 0; c < RANKS; ++c)
              for (int64_t v = 0; v < VECTORS; ++v)
                sum[c][v] = load_vector(to + c * COLUMNS + v * LANES);
            for (int64_t j = 0; j < rows; ++j, left += RANKS, right += COLUMNS) {
              Vector row[VECTORS];
              for (int64_t v = 0; v < VECTORS; ++v) row[v] = load_vector(right + v * LANES);
#pragma GCC unroll 8
              for (int64_t c = 0; c < RANKS; ++c)
                for (int64_t v = 0; v < VECTORS; ++v)
                  sum[c][v] = multiply_add(vector_of(left[c]), row[v], sum[c][v]);
            }
            for (int64_t c = 0; c < RANKS; ++c)
              for (int64_t v = 0; v < VECTORS; ++v)
                store_vector(to + c * COLUMNS + v * LANES, sum[c][v]);
          }
      }
      for (int64_t c = 0; c < rank; ++c)
        for (int64_t j = 0; j < width; ++j)
          out[c * step + (column + j) * step_k] = sums[c * COLUMNS + j];
    }
  }
}

static void add(Number* y, int64_t ldy, int64_t m, int64_t n, const float* low, int64_t ld,
                int64_t rank, const float* t, int64_t step, int64_t step_n, int64_t threads) {
  constexpr int64_t VECTORS = LANES / 4, ROWS = 6, COLUMNS = VECTORS * LANES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> packed;
    float* const factor = resized(packed, ceil_div(n, COLUMNS) * rank * COLUMNS);
    pack(t, rank, n, step, step_n, COLUMNS, factor);
#pragma omp for
    for (int64_t row = 0; row < m; row += ROWS) {
      const int64_t rows = std::min(ROWS, m - row);
      // The last row stands for those past the end.
      const float* left[ROWS];
      for (int64_t i = 0; i < ROWS; ++i) left[i] = low + (row + std::min(i, rows - 1)) * ld;
      for (int64_t column = 0; column < n; column += COLUMNS) {
        const float* right = factor + column * rank;
        Vector sum[ROWS][VECTORS] = {};
        for (int64_t c = 0; c < rank; ++c, right += COLUMNS) {
          Vector columns[VECTORS];
          for (int64_t v = 0; v < VECTORS; ++v) columns[v] = load_vector(right + v * LANES);
#pragma GCC unroll 6
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t v = 0; v < VECTORS; ++v)
              sum[i][v] = multiply_add(vector_of(left[i][c]), columns[v], sum[i][v]);
        }
        const int64_t inside = std::min(COLUMNS, n - column);
#pragma GCC unroll 6
        for (int64_t i = 0; i < ROWS; ++i) {
          if (i >= rows) break;
          Number* const to = y + (row + i) * ldy + column;
          if (inside == COLUMNS) {
#pragma GCC unroll 4
            for (int64_t v = 0; v < VECTORS; ++v)
              store_vector(to + v * LANES, load_vector(to + v * LANES) + sum[i][v]);
          } else {
            float last[COLUMNS];
            std::memcpy(last, sum[i], sizeof(last));
            for (int64_t j = 0; j < inside; ++j) store(to + j, load(to + j) + last[j]);
          }
        }
      }
    }
  }
}
