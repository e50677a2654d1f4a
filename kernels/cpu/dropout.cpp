// Dropout from counters, as kernels/dropout.py defines it: Philox4x32 with 7 rounds, a counter for
// every eight elements.

static constexpr int64_t COUNTERS = 256, ELEMENTS = 8 * COUNTERS;  // drawn together
static constexpr int ROUNDS = 7;

// The 16-bit lanes of COUNTERS counters, from `first` on.
static inline void draw(uint64_t first, uint64_t seed, uint32_t stream, uint32_t* lanes) {
  alignas(64) uint32_t words[4][COUNTERS];
#pragma omp simd
  for (int64_t i = 0; i < COUNTERS; ++i) {
    const uint64_t counter = first + i;
    uint32_t word0 = static_cast<uint32_t>(counter), word1 = static_cast<uint32_t>(counter >> 32);
    uint32_t word2 = stream, word3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < ROUNDS; ++round) {
      const uint64_t product0 = 0xD2511F53ull * word0, product1 = 0xCD9E8D57ull * word2;
      word0 = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
      word2 = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
      word1 = static_cast<uint32_t>(product1), word3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    words[0][i] = word0, words[1][i] = word1, words[2][i] = word2, words[3][i] = word3;
  }
#pragma omp simd
  for (int64_t i = 0; i < COUNTERS; ++i)
    for (int word = 0; word < 4; ++word) lanes[4 * i + word] = words[word][i];
}

// out = kept ? x : 0 where `fills`, else kept ? x : out. A lane is kept if it is above `limit`. By
// masks, because compilers make a branch of a choice between numbers of 16 bits.
template <typename Bits>
static inline void choose(const uint16_t* lanes, uint16_t limit, bool fills, const Bits* x,
                          Bits* out, int64_t count) {
  if (fills) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] & -static_cast<Bits>(lanes[i] > limit);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      out[i] ^= (x[i] ^ out[i]) & -static_cast<Bits>(lanes[i] > limit);
  }
}

template <typename Bits>
static void run(bool fills, uint64_t seed, uint32_t stream, uint16_t limit, int64_t begin,
                const Bits* x, int64_t ldx, int64_t m, int64_t k, Bits* out, int64_t ld_out,
                int64_t threads) {
  const int64_t end = begin + m * k, first = begin / ELEMENTS, last = (end - 1) / ELEMENTS;
#pragma omp parallel for num_threads(threads)
  for (int64_t part = first; part <= last; ++part) {
    alignas(64) uint32_t lanes[ELEMENTS / 2];
    draw(part * COUNTERS, seed, stream, lanes);
    int64_t at = std::max(begin, part * ELEMENTS);
    const int64_t stop = std::min(end, (part + 1) * ELEMENTS);
    while (at < stop) {
      const int64_t row = (at - begin) / k, column = (at - begin) % k;
      const int64_t count = std::min(stop - at, k - column);
      choose(reinterpret_cast<const uint16_t*>(lanes) + at % ELEMENTS, limit, fills,
             x + row * ldx + column, out + row * ld_out + column, count);
      at += count;
    }
  }
}

// bytes: of an element, 2 or 4. threshold: lanes below it are dropped, at least 1. begin: the number
// of the first element of x, counted from the first of all rows.
extern "C" void kernel(int64_t bytes, int64_t fills, const int64_t* seed, int64_t stream,
                       int64_t threshold, int64_t begin, const uint8_t* x, int64_t ldx, int64_t m,
                       int64_t k, uint8_t* out, int64_t ld_out, int64_t threads) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const uint16_t limit = static_cast<uint16_t>(threshold - 1);
  if (bytes == 2)
    run(fills, key, stream, limit, begin, reinterpret_cast<const uint16_t*>(x), ldx, m, k,
        reinterpret_cast<uint16_t*>(out), ld_out, threads);
  else
    run(fills, key, stream, limit, begin, reinterpret_cast<const uint32_t*>(x), ldx, m, k,
        reinterpret_cast<uint32_t*>(out), ld_out, threads);
}
