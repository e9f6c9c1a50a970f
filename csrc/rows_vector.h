// Vectors of EGSPO_LANES floats. The compiler's vector extensions carry what they can; intrinsics
// stand only where they have no name for an instruction.
//
// Included once by each source that is compiled for one kind of instructions. Everything is static:
// were a function shared between those sources, the linker might keep the one that this processor
// cannot run.
#ifndef EGSPO_ROWS_VECTOR_H_
#define EGSPO_ROWS_VECTOR_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(EGSPO_LANES)
#if defined(__AVX512F__)
#define EGSPO_LANES 16
#elif defined(__AVX2__)
#define EGSPO_LANES 8
#else
#define EGSPO_LANES 4
#endif
#endif

#define EGSPO_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kLanes = EGSPO_LANES;
constexpr int kPair = 2 * kLanes;

typedef float Vec __attribute__((vector_size(4 * EGSPO_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * EGSPO_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * EGSPO_LANES)));
typedef uint64_t Wide __attribute__((vector_size(4 * EGSPO_LANES)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To>
EGSPO_INLINE To load(const void* from) {
  To value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename From>
EGSPO_INLINE void store(void* to, From value) {
  std::memcpy(to, &value, sizeof value);
}

EGSPO_INLINE Vec splat(float value) { return value - Vec{}; }
EGSPO_INLINE Bits splat_bits(uint32_t value) { return value - Bits{}; }
EGSPO_INLINE Vec choose(Int mask, Vec yes, Vec no) {
  return mask ? yes : no;
}
// NaN in `a` is passed over, in `b` kept: the x86 instruction, and what `>` says elsewhere.
EGSPO_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__) && EGSPO_LANES == 16
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && EGSPO_LANES == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

EGSPO_INLINE float sum_of(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

EGSPO_INLINE float largest_of(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

EGSPO_INLINE bool any(Int mask) {
  uint64_t words[kLanes / 2];
  store(words, mask);
  uint64_t found = 0;
  for (uint64_t word : words) found |= word;
  return found != 0;
}

// 2^y; 0 below -127, NaN of NaN. Relative error 8e-8, and 1 exactly of 0: a polynomial of degree 6,
// fitted in the Chebyshev sense to 2e-9 with its constant held at 1.
EGSPO_INLINE Vec exp2_of(Vec y) {
  y = larger(splat(-127.0f), y);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: its sum with y has round(y) in its low bits
  const Vec rounded = y + magic;
  const Vec f = y - (rounded - magic);
  Vec p = splat(0x1.41fbbcp-13f);
  p = p * f + splat(0x1.5f3e54p-10f);
  p = p * f + splat(0x1.3b2d4cp-7f);
  p = p * f + splat(0x1.c6aee8p-5f);
  p = p * f + splat(0x1.ebfbdcp-3f);
  p = p * f + splat(0x1.62e430p-1f);
  p = p * f + splat(1.0f);
  return (Vec)((Bits)p + ((Bits)rounded << 23));
}

// log(w) of positive normal w: 2 artanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...), s = (z - 1) / (z + 1),
// of the mantissa z in [sqrt(1/2), sqrt(2)).
EGSPO_INLINE Vec log_of(Vec w) {
  const Bits root_half = splat_bits(0x3f3504f3);
  const Bits shifted = (Bits)w - root_half;
  const Int exponent = (Int)shifted >> 23;
  const Vec z = (Vec)((shifted & splat_bits(0x007fffff)) + root_half);
  const Vec s = (z - 1.0f) / (z + 1.0f);
  const Vec s2 = s * s;
  Vec p = s2 * (1.0f / 9) + splat(1.0f / 7);
  p = p * s2 + splat(1.0f / 5);
  p = p * s2 + splat(1.0f / 3);
  const Vec k = __builtin_convertvector(exponent, Vec);
  return k * 0x1.62e430p-1f + (k * -0x1.05c610p-29f + 2.0f * (s + s * s2 * p));
}

// Products of the even lanes, 64 bits each.
EGSPO_INLINE Wide multiply_even(Bits a, Bits b) {
#if defined(__AVX512F__) && EGSPO_LANES == 16
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && EGSPO_LANES == 8
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && EGSPO_LANES == 4
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  const Wide low = 0xffffffffu - Wide{};
  return ((Wide)a & low) * ((Wide)b & low);
#endif
}

// High and low halves of the product of each lane with `b`.
EGSPO_INLINE void multiply(Bits a, uint32_t b, Bits& high, Bits& low) {
  const Wide mask = 0xffffffffu - Wide{};
  const Bits factor = splat_bits(b);
  const Wide even = multiply_even(a, factor);
  const Wide odd = multiply_even((Bits)((Wide)a >> 32), factor);
  high = (Bits)((even >> 32) | (odd & ~mask));
  low = (Bits)((even & mask) | (odd << 32));
}

// Loads and stores of a pair of vectors. Of bfloat16 the pair is the even and the odd columns,
// which one word each holds; the order of columns matters to no sum here.
EGSPO_INLINE void load_pair(const float* x, Vec& a, Vec& b) {
  a = load<Vec>(x);
  b = load<Vec>(x + kLanes);
}

EGSPO_INLINE void store_pair(float* x, Vec a, Vec b) {
  store(x, a);
  store(x + kLanes, b);
}

EGSPO_INLINE void load_pair(const BFloat16* x, Vec& a, Vec& b) {
  const Bits words = load<Bits>(x);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  a = (Vec)(words << 16);
  b = (Vec)(words & splat_bits(0xffff0000u));
#else
#error "bfloat16 pairs are unpacked for little-endian machines"
#endif
}

// Rounded to nearest even in the upper half of the word; NaN stays NaN.
EGSPO_INLINE Bits round_bfloat16(Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (Bits)choose((Int)(v == v), (Vec)rounded, (Vec)splat_bits(0x7fc00000u));
}

EGSPO_INLINE void store_pair(BFloat16* x, Vec a, Vec b) {
  store(x, (round_bfloat16(a) >> 16) | (round_bfloat16(b) & 0xffff0000u));
}

EGSPO_INLINE float half_to_float(Float16 half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000u) << 16;
  uint32_t bits = uint32_t(half.bits & 0x7fffu) << 13;
  if (bits >= 0x0f800000u) {  // infinity and NaN
    bits |= 0x7f800000u;
  } else {  // the exponent is 112 too small, which a product mends, of subnormals too
    bits = load<uint32_t>(&(const float&)(load<float>(&bits) * 0x1p112f));
  }
  bits |= sign;
  return load<float>(&bits);
}

EGSPO_INLINE Float16 float_to_half(float value) {
  uint32_t bits = load<uint32_t>(&value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {  // subnormal: the sum has its bits at the bottom, rounded
    const float sum = load<float>(&bits) + 0.5f;
    return {uint16_t(sign | (load<uint32_t>(&sum) - 0x3f000000u))};
  }
  const uint32_t rounded = bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u);
  return {uint16_t(sign | (rounded >> 13))};
}

EGSPO_INLINE Vec load_half(const Float16* x) {
#if defined(__AVX512F__) && EGSPO_LANES == 16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__F16C__) && EGSPO_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float(x[i]);
  return load<Vec>(lanes);
#endif
}

EGSPO_INLINE void store_half(Float16* x, Vec v) {
#if defined(__AVX512F__) && EGSPO_LANES == 16
  _mm256_storeu_si256((__m256i*)x, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && EGSPO_LANES == 8
  _mm_storeu_si128((__m128i*)x, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) x[i] = float_to_half(lanes[i]);
#endif
}

EGSPO_INLINE void load_pair(const Float16* x, Vec& a, Vec& b) {
  a = load_half(x);
  b = load_half(x + kLanes);
}

EGSPO_INLINE void store_pair(Float16* x, Vec a, Vec b) {
  store_half(x, a);
  store_half(x + kLanes, b);
}

template <typename T>
EGSPO_INLINE T minus_infinity();
template <>
inline __attribute__((always_inline)) float minus_infinity<float>() {
  return -__builtin_inff();
}
template <>
inline __attribute__((always_inline)) BFloat16 minus_infinity<BFloat16>() {
  return {0xff80};
}
template <>
inline __attribute__((always_inline)) Float16 minus_infinity<Float16>() {
  return {0xfc00};
}

}  // namespace

#endif  // EGSPO_ROWS_VECTOR_H_
