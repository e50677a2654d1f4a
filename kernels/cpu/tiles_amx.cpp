// Products of tiles by AMX.

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

// Sums of 32 x 32, in rows of two tiles from `first` and `second`, = left [32, steps * 32] right
// [steps * 32, 32], or += if it `adds`.
static inline void multiply(const uint16_t* left, int64_t ld, int64_t left_step,
                            int64_t left_second, const uint16_t* right, int64_t right_step,
                            int64_t steps, float* first, float* second, bool adds) {
  barrier();
  if (adds) {
    _tile_loadd(0, first, 64);
    _tile_loadd(1, first + SUMS, 64);
    _tile_loadd(2, second, 64);
    _tile_loadd(3, second + SUMS, 64);
  } else {
    clear();
  }
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, left + i * left_step, ld * 2);
    _tile_loadd(5, left + i * left_step + left_second, ld * 2);
    _tile_loadd(6, right + i * right_step, 64);
    _tile_loadd(7, right + i * right_step + TILE_SIZE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  stored(first, second);
}
