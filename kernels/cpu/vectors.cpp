// Vectors of float32 as wide as the processor's, by the vector extensions of GCC and Clang.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#if defined(__AVX512F__)
static constexpr int64_t LANES = 16;
#else
static constexpr int64_t LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline Vector vector_of(float value) {
#if defined(__AVX512F__)
  return (Vector)_mm512_set1_ps(value);
#elif defined(__AVX__)
  return (Vector)_mm256_set1_ps(value);
#else
  return Vector{} + value;
#endif
}
static inline Vector load_vector(const float* in) {
  Vector value;
  std::memcpy(&value, in, sizeof(value));
  return value;
}
static inline void store_vector(float* out, Vector value) { std::memcpy(out, &value, sizeof(value)); }

// From and to bfloat16, as `load` and `store` do it.
static inline Vector load_vector(const uint16_t* in) {
  Halves halves;
  std::memcpy(&halves, in, sizeof(halves));
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}
static inline void store_vector(uint16_t* out, Vector value) {
  const Words bits = (Words)value;
  const Words upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(upper, Halves);
  std::memcpy(out, &halves, sizeof(halves));
}

// a * b + c, rounded once where the processor can.
static inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__F16C__)
// A float16 number.
struct Half {
  uint16_t bits;
};
static inline float load(const Half* in) { return _cvtsh_ss(in->bits); }
static inline void store(Half* out, float value) { out->bits = _cvtss_sh(value, 0); }
static inline Vector load_vector(const Half* in) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#else
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#endif
}
static inline void store_vector(Half* out, Vector value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph((__m512)value, 0));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)value, 0));
#endif
}
#endif
