// The gradients of scaled dot-product attention (Dao 2023, "FlashAttention-2"): scores are computed
// again, block by block, as keys times queries, so that a query's log-sum-exp is one lane of a
// vector, and rows of probabilities and of the scores' gradients are tiles of a left operand.

static constexpr int64_t KEYS = 128, QUERIES = 256;  // of a block

// One thread's memory for one head at a time; d, keys and queries are rounded up to 32.
struct Scratch {
  std::vector<uint16_t> memory;
  int64_t d, queries;
  uint16_t *query_t, *query, *grad_t, *grad;  // packed, of all queries
  uint16_t *key, *value, *key_t;              // of a block of keys: rows; left tiles
  uint16_t *probability, *slope, *packed;     // of a block: [KEYS, QUERIES]; right tiles
  float *log_sum, *delta;                     // [queries]
  float *grad_query, *grad_key, *grad_value;  // tiles of sums

  void reserve(int64_t rows, int64_t keys, int64_t width) {
    d = width, queries = rows;
    const int64_t sizes[] = {rows * d,       rows * d,       rows * d,       rows * d,
                             KEYS * d,       KEYS * d,       KEYS * d,       KEYS * QUERIES,
                             KEYS * QUERIES, KEYS * QUERIES, 2 * rows,       2 * rows,
                             2 * rows * d,   2 * keys * d,   2 * keys * d};
    int64_t total = 32;
    for (int64_t size : sizes) total += size;
    if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
    uint16_t* at = memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / 2;
    uint16_t** narrow[] = {&query_t, &query, &grad_t,      &grad,  &key,
                           &value,   &key_t, &probability, &slope, &packed};
    float** wide[] = {&log_sum, &delta, &grad_query, &grad_key, &grad_value};
    for (int i = 0; i < 10; at += sizes[i++]) *narrow[i] = at;
    for (int i = 0; i < 5; at += sizes[10 + i++]) *wide[i] = reinterpret_cast<float*>(at);
  }
};

// Whether any of 32 keys, from `key`, counts for any of 32 queries, from `query`.
static bool counts(const Scratch& s, const Mask& mask, int64_t key, int64_t query) {
  if (!mask.at) return true;
  for (int64_t i = 0; i < 32; ++i) {
    // Where no key counts, some masks have the lowest number for all of them, and so has the sum.
    const __m512 sum = _mm512_set1_ps(s.log_sum[query + i]), least = _mm512_set1_ps(-1e30f);
    for (int64_t half = 0; half < 32; half += TILE)
      if (_mm512_cmp_ps_mask(mask.load(query + i, key + half) - sum, least, _CMP_NLT_UQ)) return true;
  }
  return false;
}

// Probabilities and the scores' gradients of 32 keys, from `key`, and 32 queries, from `query`, as
// rows of the block's at `row`, `column`.
static void scores(const Scratch& s, const Mask& mask, int64_t key, int64_t query, int64_t row,
                   int64_t column) {
  uint16_t* probability = s.probability + row * QUERIES + column;
  uint16_t* slope = s.slope + row * QUERIES + column;
  uint16_t* packed = s.packed + (row / 32 * (QUERIES / TILE) + column / TILE) * TILE_SIZE;
  if (!counts(s, mask, key, query)) {
    for (int64_t i = 0; i < 32; ++i) {
      _mm512_storeu_si512(probability + i * QUERIES, _mm512_setzero_si512());
      _mm512_storeu_si512(slope + i * QUERIES, _mm512_setzero_si512());
    }
    std::memset(packed, 0, 2 * TILE_SIZE * sizeof(*packed));
    return;
  }
  alignas(64) float score[4 * SUMS], product[4 * SUMS];
  alignas(64) __m512i bias[64];
  const int64_t tile = query / TILE * TILE_SIZE, step = s.queries / TILE * TILE_SIZE;
  multiply(s.key + row * s.d, s.d, 32, TILE * s.d, s.query_t + tile, step, s.d / 32, score,
           score + 2 * SUMS, false);
  multiply(s.value + row * s.d, s.d, 32, TILE * s.d, s.grad_t + tile, step, s.d / 32, product,
           product + 2 * SUMS, false);
  if (mask.at) mask.load_tiles(key, query, bias);
  const __m512 scale = _mm512_set1_ps(mask.scale), log2_e = _mm512_set1_ps(LOG2_E);
  const bool whole = key + 32 <= mask.keys && (!mask.causal || query >= key + 31);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 sums[2], deltas[2];
  for (int half = 0; half < 2; ++half) {
    sums[half] = _mm512_load_ps(s.log_sum + query + half * TILE);
    deltas[half] = _mm512_load_ps(s.delta + query + half * TILE);
  }
  __m512i even = _mm512_setzero_si512();
  for (int64_t i = 0; i < 32; ++i) {
    const float* at = score + i / TILE * 2 * SUMS + i % TILE * TILE;
    const float* of = product + i / TILE * 2 * SUMS + i % TILE * TILE;
    __m512 p[2], ds[2];
    for (int half = 0; half < 2; ++half) {
      __m512 exponent = _mm512_load_ps(at + half * SUMS) * scale;
      if (mask.at)
        exponent += _mm512_castsi512_ps(bias[(i / TILE * 2 + half) * TILE + i % TILE]);
      p[half] = exponential((exponent - sums[half]) * log2_e);
      ds[half] = p[half] * (_mm512_load_ps(of + half * SUMS) - deltas[half]);
      if (!whole) {
        // Lanes before the key's own are of queries that come before it.
        const auto past = static_cast<int>(key + i - query - half * TILE);
        __mmask16 inside = key + i < mask.keys ? 0xFFFF : 0;
        if (mask.causal) inside &= _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(past));
        p[half] = _mm512_maskz_mov_ps(inside, p[half]);
        ds[half] = _mm512_maskz_mov_ps(inside, ds[half]);
      }
    }
    _mm512_storeu_si512(probability + i * QUERIES, narrow(p[0], p[1]));
    const __m512i slopes = narrow(ds[0], ds[1]);
    _mm512_storeu_si512(slope + i * QUERIES, slopes);
    if (i % 2) {
      interleave(even, slopes, packed + i / 2 * 32, packed + i / 2 * 32 + TILE_SIZE);
    } else {
      even = slopes;
    }
  }
}

// Adds what a block of `keys` and `queries`, from `key` and `query`, gives to all three gradients.
static void block(const Scratch& s, const Mask& mask, int64_t key, int64_t keys, int64_t query,
                  int64_t queries) {
  // The first query, and past the last key, that count.
  const auto first = [&](int64_t row) {
    return mask.causal ? std::max<int64_t>(0, key + row - query) : 0;
  };
  for (int64_t row = 0; row < keys; row += 32)
    for (int64_t column = first(row); column < queries; column += 32)
      scores(s, mask, key + row, query + column, row, column);
  const int64_t width = s.d / TILE;
  for (int64_t row = 0; row < keys; row += 32) {
    const int64_t column = first(row);
    if (column >= queries) break;
    const int64_t steps = (queries - column) / 32, right_step = width * TILE_SIZE;
    for (int64_t i = 0; i < width; i += 2)
      for (int both = 0; both < 2; ++both) {
        float* sums = (both ? s.grad_key : s.grad_value) + ((key + row) / TILE * width + i) * SUMS;
        const uint16_t* left = (both ? s.slope : s.probability) + row * QUERIES + column;
        const uint16_t* right = both ? s.query : s.grad;
        multiply(left, QUERIES, 32, TILE * QUERIES,
                 right + ((query + column) / 32 * width + i) * TILE_SIZE, right_step, steps, sums,
                 sums + width * SUMS, true);
      }
  }
  const int64_t tiles = s.queries / TILE;
  for (int64_t column = 0; column < queries; column += 32) {
    const int64_t rows = mask.causal ? std::min(keys, query + column + 32 - key) : keys;
    if (rows <= 0) continue;
    for (int64_t i = 0; i < width; i += 2) {
      float* sums = s.grad_query + (i * tiles + (query + column) / TILE) * SUMS;
      multiply(s.key_t + i * (KEYS / 32) * TILE_SIZE, 32, TILE_SIZE, KEYS / 32 * TILE_SIZE,
               s.packed + column / TILE * TILE_SIZE, QUERIES / TILE * TILE_SIZE, rows / 32, sums,
               sums + tiles * SUMS, true);
    }
  }
}

struct Operand {
  const uint16_t* at;
  int64_t step;
};

// Adds what one head of queries gives to grad_key and grad_value; grad_query is its own.
static void head(const Scratch& s, const Mask& mask, Operand q, Operand k, Operand v, Operand grad,
                 Operand out, const float* log_sum, int64_t log_step, int64_t d) {
  const int64_t rows = s.queries, width = s.d;
  pack_transposed(q.at, q.step, mask.queries, d, s.query_t);
  pack_right(q.at, q.step, mask.queries, d, s.query);
  pack_transposed(grad.at, grad.step, mask.queries, d, s.grad_t);
  pack_right(grad.at, grad.step, mask.queries, d, s.grad);
  for (int64_t i = 0; i < rows; ++i) {
    // What is no query has no probabilities.
    s.log_sum[i] = i < mask.queries ? log_sum[i * log_step] : INFINITY;
    __m512 delta = _mm512_setzero_ps();
    for (int64_t j = 0; j < d; j += 32)
      delta = add_products(delta, row_of(grad.at, grad.step, i, mask.queries, j, d),
                           row_of(out.at, out.step, i, mask.queries, j, d));
    s.delta[i] = _mm512_reduce_add_ps(delta);
  }
  std::memset(s.grad_query, 0, rows * width * sizeof(float));
  for (int64_t key = 0; key < mask.keys; key += KEYS) {
    const int64_t keys = std::min(KEYS, ceil_div(mask.keys - key, 32) * 32);
    pack_rows(k.at, k.step, key, keys, mask.keys, d, s.key);
    pack_rows(v.at, v.step, key, keys, mask.keys, d, s.value);
    transpose_rows(s.key, keys, width, KEYS / 32, s.key_t);
    for (int64_t query = mask.causal ? key / QUERIES * QUERIES : 0; query < rows; query += QUERIES)
      block(s, mask, key, keys, query, std::min(QUERIES, rows - query));
  }
}

// q, grad, out and grad_q [batch, groups * shared, queries, d], k, v, grad_k and grad_v [batch,
// groups, keys, d] of contiguous rows; log_sum [batch, groups * shared, queries] of the scaled and
// masked scores; bias [batch, groups * shared, queries, keys], to be added to them, of numbers of
// `bias_size` bytes, 0 if there is none. strides: three of each, in the order of the arguments, 0
// where they repeat.
extern "C" void kernel(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                       const uint16_t* grad, const uint16_t* out, const float* log_sum,
                       const uint8_t* bias, uint16_t* grad_q, uint16_t* grad_k, uint16_t* grad_v,
                       const int64_t* strides, int64_t bias_size, int64_t batch, int64_t groups,
                       int64_t shared, int64_t queries, int64_t keys, int64_t d, int64_t causal,
                       float scale, int64_t threads) {
  const auto* steps = reinterpret_cast<const Steps*>(strides);
  const int64_t rows = ceil_div(queries, 32) * 32, width = ceil_div(d, 32) * 32;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch s;
    const int64_t all_keys = ceil_div(keys, 32) * 32;
    s.reserve(rows, all_keys, width);
    Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < batch * groups; ++group) {
      const int64_t b = group / groups, of_keys = group % groups;
      std::memset(s.grad_key, 0, all_keys * width * sizeof(float));
      std::memset(s.grad_value, 0, all_keys * width * sizeof(float));
      for (int64_t h = of_keys * shared; h < (of_keys + 1) * shared; ++h) {
        const auto operand = [&](const uint16_t* at, int i) {
          return Operand{at + steps[i].of(b, i == 1 || i == 2 ? of_keys : h), steps[i].row};
        };
        const uint8_t* added = bias_size ? bias + steps[6].of(b, h) * bias_size : nullptr;
        const Mask mask{added, bias_size, steps[6].row, causal != 0, scale, queries, keys};
        head(s, mask, operand(q, 0), operand(k, 1), operand(v, 2), operand(grad, 3),
             operand(out, 4), log_sum + steps[5].of(b, h), steps[5].row, d);
        for (int64_t j = 0; j < d; j += TILE)
          for (int64_t i = 0; i < queries; i += TILE) {
            alignas(64) __m512i sum[16];
            const float* from = s.grad_query + (j / TILE * (rows / TILE) + i / TILE) * SUMS;
            for (int c = 0; c < 16; ++c) sum[c] = _mm512_loadu_si512(from + c * TILE);
            transpose(sum);
            for (int64_t c = 0; c < std::min(TILE, queries - i); ++c)
              store_row(reinterpret_cast<const float*>(sum + c), scale, std::min(TILE, d - j),
                        grad_q + steps[7].of(b, h) + (i + c) * steps[7].row + j);
          }
      }
      for (int64_t i = 0; i < keys; ++i)
        for (int64_t j = 0; j < d; j += TILE) {
          const int64_t from = (i / TILE * (width / TILE) + j / TILE) * SUMS + i % TILE * TILE;
          const int64_t inside = std::min(TILE, d - j);
          store_row(s.grad_key + from, scale, inside,
                    grad_k + steps[8].of(b, of_keys) + i * steps[8].row + j);
          store_row(s.grad_value + from, 1.0f, inside,
                    grad_v + steps[9].of(b, of_keys) + i * steps[9].row + j);
        }
    }
  }
}
