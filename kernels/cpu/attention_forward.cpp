// Scaled dot-product attention (Dao 2023, "FlashAttention-2"): a block of queries at a time, with
// scores as keys times queries, so that a query's largest score and its sum are one lane of a
// vector, and rows of probabilities make up the tiles of a right operand.

static constexpr int64_t KEYS = 128, QUERIES = 128;  // of a block

// One thread's memory for one block of queries; d is rounded up to 32.
struct Scratch {
  std::vector<uint16_t> memory;
  int64_t d;
  uint16_t *query_t;             // right tiles of all queries of the block, transposed
  uint16_t *key, *value, *value_t;  // of a block of keys: rows; left tiles
  uint16_t* probability;         // right tiles of 32 queries, [KEYS / 32][2]
  float *score;                  // tiles of keys and 32 queries, [KEYS / 32][4]
  float *sums;                   // tiles of the result, transposed, [d / 16][QUERIES / 16]

  void reserve(int64_t width) {
    d = width;
    const int64_t sizes[] = {QUERIES * d, KEYS * d,      KEYS * d,        KEYS * d,
                             KEYS * 32,   2 * KEYS * 32, 2 * QUERIES * d};
    int64_t total = 32;
    for (int64_t size : sizes) total += size;
    if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
    uint16_t* at = memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / 2;
    uint16_t** narrow[] = {&query_t, &key, &value, &value_t, &probability};
    float** wide[] = {&score, &sums};
    for (int i = 0; i < 5; at += sizes[i++]) *narrow[i] = at;
    for (int i = 0; i < 2; at += sizes[5 + i++]) *wide[i] = reinterpret_cast<float*>(at);
  }
};

// The largest score and the sum of 16 queries so far; the sum is of powers relative to the score.
struct State {
  __m512 largest, sum;
};

// Scores of 32 keys, from `key`, and 32 queries, from `query`, scaled and masked, in four tiles.
// Raises `largest` of both halves of the queries to theirs.
static inline void scores(const Mask& mask, int64_t key, int64_t query, float* score,
                          __m512* largest) {
  alignas(64) __m512i bias[64];
  if (mask.at) mask.load_tiles(key, query, bias);
  const __m512 scale = _mm512_set1_ps(mask.scale), none = _mm512_set1_ps(-INFINITY);
  const bool whole = key + 32 <= mask.keys && (!mask.causal || query >= key + 31);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < 32; ++i)
    for (int half = 0; half < 2; ++half) {
      const int64_t tile = i / TILE * 2 + half;
      float* at = score + tile * SUMS + i % TILE * TILE;
      __m512 value = _mm512_load_ps(at) * scale;
      if (mask.at) value += _mm512_castsi512_ps(bias[tile * TILE + i % TILE]);
      if (!whole) {
        // Lanes before the key's own are of queries that come before it.
        const auto past = static_cast<int>(key + i - query - half * TILE);
        __mmask16 inside = key + i < mask.keys ? 0xFFFF : 0;
        if (mask.causal) inside &= _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(past));
        value = _mm512_mask_mov_ps(none, inside, value);
      }
      _mm512_store_ps(at, value);
      largest[half] = _mm512_max_ps(value, largest[half]);  // of a NaN and a number the number
    }
}

// Adds what `keys` keys, from `key`, give to 32 queries, from `query`, whose first is the block's
// `column`.
static void add(const Scratch& s, const Mask& mask, int64_t key, int64_t keys, int64_t query,
                int64_t column, State* states) {
  const int64_t tiles = QUERIES / TILE;
  __m512 largest[2] = {states[0].largest, states[1].largest};
  for (int64_t row = 0; row < keys; row += 32) {
    float* score = s.score + row / 32 * 4 * SUMS;
    multiply(s.key + row * s.d, s.d, 32, TILE * s.d, s.query_t + column / TILE * TILE_SIZE,
             tiles * TILE_SIZE, s.d / 32, score, score + 2 * SUMS, false);
    scores(mask, key + row, query, score, largest);
  }
  const __m512 log2_e = _mm512_set1_ps(LOG2_E);
  __m512 factor[2], shift[2];
  bool same = true;
  for (int half = 0; half < 2; ++half) {
    // Where no key has counted yet, every power is 0.
    const __mmask16 any =
        _mm512_cmp_ps_mask(largest[half], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    shift[half] = _mm512_maskz_mov_ps(any, largest[half]);
    factor[half] = exponential((states[half].largest - shift[half]) * log2_e);
    same &= _mm512_cmp_ps_mask(states[half].largest, largest[half], _CMP_EQ_OQ) == 0xFFFF;
    states[half].sum *= factor[half];
    states[half].largest = largest[half];
  }
  for (int64_t row = 0; row < keys; row += 2) {
    const float* from = s.score + row / 32 * 4 * SUMS + row % 32 / TILE * 2 * SUMS + row % TILE * TILE;
    __m512i pair[2];
    for (int i = 0; i < 2; ++i) {
      __m512 power[2];
      for (int half = 0; half < 2; ++half) {
        const __m512 score = _mm512_load_ps(from + i * TILE + half * SUMS);
        power[half] = exponential((score - shift[half]) * log2_e);
        states[half].sum += power[half];
      }
      pair[i] = narrow(power[0], power[1]);
    }
    uint16_t* to = s.probability + row / 32 * 2 * TILE_SIZE + row % 32 / 2 * 32;
    interleave(pair[0], pair[1], to, to + TILE_SIZE);
  }
  for (int64_t i = 0; i < s.d / TILE; i += 2) {
    float* sums = s.sums + (i * tiles + column / TILE) * SUMS;
    if (!same)
      for (int64_t both = 0; both < 2; ++both)
        for (int64_t j = 0; j < 2 * TILE; ++j) {
          float* at = sums + both * tiles * SUMS + j * TILE;
          _mm512_store_ps(at, _mm512_load_ps(at) * factor[j / TILE]);
        }
    multiply(s.value_t + i * (KEYS / 32) * TILE_SIZE, 32, TILE_SIZE, KEYS / 32 * TILE_SIZE,
             s.probability, 2 * TILE_SIZE, keys / 32, sums, sums + tiles * SUMS, true);
  }
}

// q and out [batch, groups * shared, queries, d], k and v [batch, groups, keys, d] of contiguous
// rows; bias [batch, groups * shared, queries, keys], to be added to the scaled scores, of numbers of
// `bias_size` bytes, 0 if there is none; log_sum [batch, groups * shared, queries] of the scaled
// and masked scores, 0 where no key counts. strides: three of each, in the order of the arguments,
// 0 where they repeat.
extern "C" void kernel(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                       const uint8_t* bias, uint16_t* out, float* log_sum, const int64_t* strides,
                       int64_t bias_size, int64_t batch, int64_t groups, int64_t shared,
                       int64_t queries, int64_t keys, int64_t d, int64_t causal, float scale,
                       int64_t threads) {
  const auto* steps = reinterpret_cast<const Steps*>(strides);
  const int64_t width = ceil_div(d, 32) * 32, blocks = ceil_div(queries, QUERIES);
  const int64_t heads = groups * shared;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch s;
    s.reserve(width);
    Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * heads * blocks; ++task) {
      const int64_t b = task / blocks / heads, h = task / blocks % heads;
      const int64_t first = (blocks - 1 - task % blocks) * QUERIES;  // the longest ones go first
      const int64_t rows = std::min(QUERIES, queries - first);
      const uint8_t* added = bias_size ? bias + steps[3].of(b, h) * bias_size : nullptr;
      const Mask mask{added, bias_size, steps[3].row, causal != 0, scale, queries, keys};
      const uint16_t* key_at = k + steps[1].of(b, h / shared);
      const uint16_t* value_at = v + steps[2].of(b, h / shared);
      for (int64_t column = 0, at = 0; column < width; column += 32)
        for (int64_t row = 0; row < QUERIES; row += TILE, at += TILE_SIZE) {
          __m512i block[16];
          for (int i = 0; i < 16; ++i)
            block[i] = row_of(q + steps[0].of(b, h), steps[0].row, first + row + i, queries, column, d);
          transpose(block);
          for (int i = 0; i < 16; ++i) _mm512_store_si512(s.query_t + at + i * 32, block[i]);
        }
      State states[QUERIES / TILE];
      for (State& each : states) each = {_mm512_set1_ps(-INFINITY), _mm512_setzero_ps()};
      std::memset(s.sums, 0, QUERIES * width * sizeof(float));
      const int64_t last = causal ? std::min(keys, first + rows) : keys;
      for (int64_t key = 0; key < last; key += KEYS) {
        const int64_t count = ceil_div(std::min(KEYS, last - key), 32) * 32;
        pack_rows(key_at, steps[1].row, key, count, keys, d, s.key);
        pack_rows(value_at, steps[2].row, key, count, keys, d, s.value);
        transpose_rows(s.value, count, width, KEYS / 32, s.value_t);
        for (int64_t column = 0; column < rows; column += 32) {
          const int64_t some = causal ? std::min(count, first + column + 32 - key) : count;
          if (some > 0) add(s, mask, key, some, first + column, column, states + column / TILE);
        }
      }
      for (int64_t i = 0; i < rows; i += TILE) {
        const State& state = states[i / TILE];
        const int64_t inside = std::min(TILE, rows - i);
        const __mmask16 any = _mm512_cmp_ps_mask(state.sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        alignas(64) float total[16], largest[16];
        _mm512_store_ps(total, state.sum);
        _mm512_store_ps(largest, state.largest);
        for (int64_t c = 0; c < inside; ++c)
          log_sum[steps[5].of(b, h) + (first + i + c) * steps[5].row] =
              any >> c & 1 ? largest[c] + std::log(total[c]) : 0.0f;
        for (int64_t j = 0; j < d; j += TILE) {
          alignas(64) __m512i sum[16];
          const float* from = s.sums + (j / TILE * (QUERIES / TILE) + i / TILE) * SUMS;
          for (int c = 0; c < 16; ++c)
            sum[c] = _mm512_castps_si512(
                _mm512_maskz_div_ps(any, _mm512_load_ps(from + c * TILE), state.sum));
          transpose(sum);
          for (int64_t c = 0; c < inside; ++c)
            store_row(reinterpret_cast<const float*>(sum + c), 1.0f, std::min(TILE, d - j),
                      out + steps[4].of(b, h) + (first + i + c) * steps[4].row + j);
        }
      }
    }
  }
}
