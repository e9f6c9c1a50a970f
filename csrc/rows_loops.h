// The loops of rows_table.h, over vectors. Included once by each source that is compiled for one
// kind of instructions.
#ifndef EGSPO_ROWS_LOOPS_H_
#define EGSPO_ROWS_LOOPS_H_

#include "rows_table.h"
#include "rows_vector.h"

namespace {

using egspo::Affine;
using egspo::EntropyOf;
using egspo::GradientTerms;
using egspo::PairSums;
using egspo::SampleAffines;
using egspo::SampleSums;
using egspo::Sums;

// The columns behind the last whole pair of vectors, the rest of the pair at -inf.
template <typename T>
struct Tail {
  T columns[kPair];

  static inline __attribute__((always_inline)) Tail of(const T* x, int64_t n) {
    Tail tail;
    for (int i = 0; i < kPair; ++i) tail.columns[i] = i < n ? x[i] : minus_infinity<T>();
    return tail;
  }
};

// f(a, b) of every pair of vectors.
template <typename T, typename F>
EGSPO_INLINE void each_pair(const T* x, int64_t n, F f) {
  Vec a, b;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load_pair(x + i, a, b);
    f(a, b);
  }
  if (i < n) {
    const auto tail = Tail<T>::of(x + i, n - i);
    load_pair(tail.columns, a, b);
    f(a, b);
  }
}

// f(x's pair, y's pair) of every pair of vectors of two rows.
template <typename T, typename F>
EGSPO_INLINE void each_two_pairs(const T* x, const T* y, int64_t n, F f) {
  Vec xa, xb, ya, yb;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load_pair(x + i, xa, xb);
    load_pair(y + i, ya, yb);
    f(xa, xb, ya, yb);
  }
  if (i < n) {
    const auto tail = Tail<T>::of(x + i, n - i);
    const auto other = Tail<T>::of(y + i, n - i);
    load_pair(tail.columns, xa, xb);
    load_pair(other.columns, ya, yb);
    f(xa, xb, ya, yb);
  }
}

EGSPO_INLINE Vec apply(Affine affine, Vec x) { return x * splat(affine.scale) - splat(affine.shift); }

// Columns that are added up before they meet the sum of those before: a lane that holds a number
// near 1 rounds each small one that is added to it, and so does it for this many alone.
constexpr int64_t kStretch = 16 * kPair;

EGSPO_INLINE int64_t stretch(int64_t n, int64_t start) {
  return n - start < kStretch ? n - start : kStretch;
}

// Where the exponential is 0 its logarithm must not be infinite: their product is 0.
EGSPO_INLINE Vec floored(Vec y) { return larger(splat(-127.0f), y); }

template <typename T>
float maximum(const void* x, int64_t n) {
  Vec ma = splat(minus_infinity<float>()), mb = ma;
  each_pair(static_cast<const T*>(x), n, [&](Vec a, Vec b) {
    ma = larger(a, ma);
    mb = larger(b, mb);
  });
  return largest_of(larger(ma, mb));
}

EGSPO_INLINE float as_float(float x) { return x; }
EGSPO_INLINE float as_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load<float>(&bits);
}
EGSPO_INLINE float as_float(Float16 x) { return half_to_float(x); }

template <typename T>
int64_t find(const void* x, int64_t n, float value) {
  const T* columns = static_cast<const T*>(x);
  const Vec wanted = splat(value);
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    Vec a, b, c, d;
    load_pair(columns + i, a, b);
    load_pair(columns + i + kPair, c, d);
    if (any((a == wanted) | (b == wanted) | (c == wanted) | (d == wanted))) break;
  }
  while (i < n && !(as_float(columns[i]) == value)) ++i;
  return i;
}

template <typename T>
void to_float(const void* x, int64_t n, float* out) {
  const T* columns = static_cast<const T*>(x);
  for (int64_t i = 0; i < n; ++i) out[i] = as_float(columns[i]);
}

template <typename T>
void from_float(const float* x, int64_t n, void* out) {
  // Pairs are stored as their own loads give them: bfloat16 takes even and odd columns.
  T* columns = static_cast<T*>(out);
  for (int64_t i = 0; i < n; i += kPair) {
    float lanes[kPair];
    T narrow[kPair];
    const int64_t count = n - i < kPair ? n - i : kPair;
    for (int64_t j = 0; j < kPair; ++j) lanes[j] = j < count ? x[i + j] : 0.0f;
    if constexpr (sizeof(T) == 2 && __is_same(T, BFloat16)) {
      float even[kLanes], odd[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        even[j] = lanes[2 * j];
        odd[j] = lanes[2 * j + 1];
      }
      store_pair(narrow, load<Vec>(even), load<Vec>(odd));
    } else {
      store_pair(narrow, load<Vec>(lanes), load<Vec>(lanes + kLanes));
    }
    std::memcpy(columns + i, narrow, count * sizeof(T));
  }
}

template <typename T>
Sums sums(const void* x, int64_t n, Affine affine) {
  Vec total{}, moment{};
  for (int64_t start = 0; start < n; start += kStretch) {
    Vec sa{}, sb{}, ta{}, tb{};
    each_pair(static_cast<const T*>(x) + start, stretch(n, start), [&](Vec a, Vec b) {
      const Vec ya = floored(apply(affine, a)), yb = floored(apply(affine, b));
      const Vec ea = exp2_of(ya), eb = exp2_of(yb);
      sa += ea;
      sb += eb;
      ta = ea * ya + ta;
      tb = eb * yb + tb;
    });
    total += sa + sb;
    moment += ta + tb;
  }
  return {sum_of(total), sum_of(moment)};
}

template <typename T, bool kOwnSampling, EntropyOf kEntropy>
SampleSums sample_sums_of(const T* x, int64_t n, const SampleAffines& affines) {
  struct {
    Vec plain{}, sampling{}, entropy{}, moment{};
  } all, part;
  const auto add = [&](Vec a) {
    Vec y = apply(affines.plain, a), e = exp2_of(y);
    part.plain += e;
    if constexpr (kOwnSampling) {
      const Vec ys = apply(affines.sampling, a), es = exp2_of(ys);
      part.sampling += es;
      if constexpr (kEntropy == EntropyOf::kSampling) {
        y = ys;
        e = es;
      }
    }
    if constexpr (kEntropy == EntropyOf::kOwn) {
      y = apply(affines.entropy, a);
      e = exp2_of(y);
    }
    if constexpr (kEntropy != EntropyOf::kPlain) part.entropy += e;
    part.moment = e * floored(y) + part.moment;
  };
  for (int64_t start = 0; start < n; start += kStretch) {
    part = {};
    each_pair(x + start, stretch(n, start), [&](Vec a, Vec b) {
      add(a);
      add(b);
    });
    all.plain += part.plain;
    all.sampling += part.sampling;
    all.entropy += part.entropy;
    all.moment += part.moment;
  }
  SampleSums result;
  result.plain = sum_of(all.plain);
  result.sampling = kOwnSampling ? sum_of(all.sampling) : result.plain;
  result.entropy = kEntropy == EntropyOf::kPlain ? result.plain : sum_of(all.entropy);
  result.moment = sum_of(all.moment);
  return result;
}

template <typename T>
SampleSums sample_sums(const void* x, int64_t n, const SampleAffines& affines, bool own_sampling,
                       EntropyOf entropy) {
  const T* columns = static_cast<const T*>(x);
  if (!own_sampling) {
    return entropy == EntropyOf::kOwn
               ? sample_sums_of<T, false, EntropyOf::kOwn>(columns, n, affines)
               : sample_sums_of<T, false, EntropyOf::kPlain>(columns, n, affines);
  }
  switch (entropy) {
    case EntropyOf::kPlain:
      return sample_sums_of<T, true, EntropyOf::kPlain>(columns, n, affines);
    case EntropyOf::kSampling:
      return sample_sums_of<T, true, EntropyOf::kSampling>(columns, n, affines);
    default:
      return sample_sums_of<T, true, EntropyOf::kOwn>(columns, n, affines);
  }
}

// p (x - y), 0 where p is 0, be the difference infinite or NaN.
EGSPO_INLINE Vec weighted(Vec p, Vec difference) {
  return p * choose((Int)(p == Vec{}), Vec{}, difference);
}

template <typename T>
PairSums pair_sums(const void* x, const void* y, int64_t n, Affine affine,
                   Affine reference_affine) {
  struct {
    Vec total{}, reference_total{}, difference{};
  } all, part;
  const auto add = [&](Vec a, Vec b) {
    const Vec u = apply(affine, a), v = apply(reference_affine, b);
    const Vec e = exp2_of(u);
    part.total += e;
    part.reference_total += exp2_of(v);
    part.difference += weighted(e, u - v);
  };
  for (int64_t start = 0; start < n; start += kStretch) {
    part = {};
    each_two_pairs(static_cast<const T*>(x) + start, static_cast<const T*>(y) + start,
                   stretch(n, start), [&](Vec xa, Vec xb, Vec ya, Vec yb) {
                     add(xa, ya);
                     add(xb, yb);
                   });
    all.total += part.total;
    all.reference_total += part.reference_total;
    all.difference += part.difference;
  }
  return {sum_of(all.total), sum_of(all.reference_total), sum_of(all.difference)};
}

template <bool kPaired>
EGSPO_INLINE Vec gradient_of(Vec a, Vec b, const GradientTerms& terms) {
  const Vec u = apply(terms.affine, a);
  const Vec p = exp2_of(u) * splat(terms.inverse_total);
  Vec factor = floored(u) * splat(terms.slope) + splat(terms.constant);
  if constexpr (!kPaired) return p * factor;
  return p * factor + weighted(p, splat(terms.difference) * (u - apply(terms.reference_affine, b)));
}

template <typename T>
void gradient(const void* x, const void* y, int64_t n, const GradientTerms& terms, void* out) {
  const T* columns = static_cast<const T*>(x);
  const T* others = static_cast<const T*>(y);
  T* written = static_cast<T*>(out);
  Vec a, b, ya{}, yb{};
  for (int64_t i = 0; i < n; i += kPair) {
    const bool whole = i + kPair <= n;
    Tail<T> tail, other;
    const T *from = columns + i, *beside = others + i;
    if (!whole) {
      from = (tail = Tail<T>::of(from, n - i)).columns;
      if (others != nullptr) beside = (other = Tail<T>::of(beside, n - i)).columns;
    }
    load_pair(from, a, b);
    if (others != nullptr) {
      load_pair(beside, ya, yb);
      a = gradient_of<true>(a, ya, terms);
      b = gradient_of<true>(b, yb, terms);
    } else {
      a = gradient_of<false>(a, ya, terms);
      b = gradient_of<false>(b, yb, terms);
    }
    if (whole) {
      store_pair(written + i, a, b);
    } else {
      store_pair(tail.columns, a, b);
      std::memcpy(written + i, tail.columns, (n - i) * sizeof(T));
    }
  }
}

// Standard exponential of a random word; bit for bit the uniform number of the reference.
EGSPO_INLINE Vec exponential(Bits word) {
  const Vec high = __builtin_convertvector((Int)(word >> 16), Vec) * splat(65536.0f);
  const Vec low = __builtin_convertvector((Int)(word & 0xffffu), Vec) + splat(0.5f);
  Vec u = (high + low) * splat(0x1p-32f);
  const Vec most = splat(1.0f - 0x1p-24f);
  u = choose((Int)(u > most), most, u);
  const Vec w = splat(1.0f) - u;
  return (u - (splat(1.0f) - w)) - log_of(w);  // what rounding w lost is restored
}

void noise(uint64_t seed, uint32_t step, uint64_t row, uint32_t group, int64_t n, float* out) {
  Bits lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  for (int64_t first = 0; first < n; first += 4 * kLanes) {
    Bits c0 = lane + (group + uint32_t(first / 4));
    Bits c1 = splat_bits(uint32_t(row)), c2 = splat_bits(uint32_t(row >> 32));
    Bits c3 = splat_bits(step);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {  // Philox 4x32-10 (Salmon et al., SC 2011)
      Bits high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    float words[4][kLanes];
    store(words[0], exponential(c0));
    store(words[1], exponential(c1));
    store(words[2], exponential(c2));
    store(words[3], exponential(c3));
    for (int i = 0; i < kLanes; ++i) {
      for (int word = 0; word < 4; ++word) out[first + 4 * i + word] = words[word][i];
    }
  }
}

void scores(const float* x, const float* noise, int64_t n, Affine affine, float* scores) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes], beside[kLanes];
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = j < count ? x[i + j] : minus_infinity<float>();
      beside[j] = j < count ? noise[i + j] : 1.0f;
    }
    store(lanes, exp2_of(apply(affine, load<Vec>(lanes))) / load<Vec>(beside));
    std::memcpy(scores + i, lanes, count * sizeof(float));
  }
}

template <typename T>
constexpr egspo::TypedLoops typed_loops() {
  return {maximum<T>,     find<T>,        to_float<T>,  from_float<T>,
          sums<T>,        sample_sums<T>, pair_sums<T>, gradient<T>};
}

constexpr egspo::RowLoops row_loops(const char* name) {
  return {name, {typed_loops<float>(), typed_loops<BFloat16>(), typed_loops<Float16>()}, noise,
          scores};
}

}  // namespace

#endif  // EGSPO_ROWS_LOOPS_H_
