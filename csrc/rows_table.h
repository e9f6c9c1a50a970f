// The inner loops over one segment of a row, compiled once for each kind of vector instructions.
#ifndef EGSPO_ROWS_TABLE_H_
#define EGSPO_ROWS_TABLE_H_

#include <cstdint>

namespace egspo {

// The exponential of column x of a segment is 2^(x * scale - shift).
struct Affine {
  float scale;
  float shift;
};

// Sums over columns: exponentials, and exponentials times their base-2 logarithms.
struct Sums {
  float total;
  float moment;
};

// Of the sums of a sample: at temperature 1, at the sampling and at the entropy temperature.
struct SampleSums {
  float plain;
  float sampling;
  float entropy;
  float moment;
};

struct SampleAffines {
  Affine plain, sampling, entropy;
};

// Whose exponentials serve for the entropy.
enum class EntropyOf { kPlain, kSampling, kOwn };

struct PairSums {
  float total;            // exponentials of the policy
  float reference_total;  // and of the reference
  float difference;       // policy's exponentials times the difference of base-2 logarithms
};

// gradient = p (constant + slope * (x scale - shift) + difference * (that of x - that of y)),
// p = 2^(x scale - shift) * inverse_total.
struct GradientTerms {
  Affine affine;
  Affine reference_affine;
  float inverse_total;
  float constant;
  float slope;
  float difference;
};

// Loops over logits of one dtype.
struct TypedLoops {
  float (*maximum)(const void* x, int64_t n);  // NaN is passed over; -inf without a number
  int64_t (*find)(const void* x, int64_t n, float value);  // first column equal to it, or n
  void (*to_float)(const void* x, int64_t n, float* out);
  void (*from_float)(const float* x, int64_t n, void* out);
  Sums (*sums)(const void* x, int64_t n, Affine affine);
  SampleSums (*sample_sums)(const void* x, int64_t n, const SampleAffines& affines,
                            bool own_sampling, EntropyOf entropy);
  PairSums (*pair_sums)(const void* x, const void* y, int64_t n, Affine affine,
                        Affine reference_affine);
  void (*gradient)(const void* x, const void* y, int64_t n, const GradientTerms& terms, void* out);
};

struct RowLoops {
  const char* name;
  TypedLoops of[3];  // by dtype
  // Standard exponentials: four from each of the counters from `group` on, (n + 3) / 4 of them.
  // `out` has room for n rounded up to kNoiseRoom.
  void (*noise)(uint64_t seed, uint32_t step, uint64_t row, uint32_t group, int64_t n, float* out);
  // scores = 2^(x * scale - shift) / noise
  void (*scores)(const float* x, const float* noise, int64_t n, Affine affine, float* scores);
};

constexpr int64_t kNoiseRoom = 64;

extern const RowLoops kBaselineLoops;
#if defined(__x86_64__)
extern const RowLoops kAvx2Loops;
extern const RowLoops kAvx512Loops;
#endif

}  // namespace egspo

#endif  // EGSPO_ROWS_TABLE_H_
