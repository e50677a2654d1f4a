// What AMX's kernels share: tiles of 16 rows of 64 bytes, and how operands become such.

#include <immintrin.h>

#include <algorithm>

static constexpr int64_t TILE = 16;
static constexpr int64_t TILE_SIZE = 512;     // bfloat16 numbers of a tile
static constexpr int64_t SUMS = TILE * TILE;  // float32 numbers of a tile
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Eight tiles of 16 rows of 64 bytes. Not made on the stack: GCC takes only its first bytes to be
// read and leaves out what writes the others.
alignas(64) extern const uint8_t CONFIG[64];
const uint8_t CONFIG[64] = {
    1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  // palette
    64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  // bytes in a row
    0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  //
    16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0,  // rows
};

struct Tiles {
  Tiles() { _tile_loadconfig(CONFIG); }
  ~Tiles() { _tile_release(); }
};

// GCC's intrinsics do not tell that loading a tile reads memory.
static inline void barrier() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums: 16 x 16 float32 each.
static inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
static inline void stored(float* first, float* second) {
  _tile_stored(0, first, 64);
  _tile_stored(1, first + SUMS, 64);
  _tile_stored(2, second, 64);
  _tile_stored(3, second + SUMS, 64);
  barrier();
}
static inline void stored(float* to) { stored(to, to + 2 * SUMS); }

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
