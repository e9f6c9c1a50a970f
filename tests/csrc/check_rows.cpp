// The loops over a segment, as vectors of EGSPO_LANES have them, against sums in double.
//
// Usage: check FIRST LAST, the seeds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "rows_loops.h"

namespace {

constexpr egspo::RowLoops kLoops = row_loops("under test");
const float kInf = __builtin_inff();

void expect(bool good, unsigned seed, const char* what) {
  if (good) return;
  std::fprintf(stderr, "seed %u: %s\n", seed, what);
  std::exit(1);
}

bool close(double a, double b, double tolerance) {
  return a == b || std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

template <typename T>
std::vector<T> narrow(const std::vector<float>& x, int dtype) {
  // Exactly as long as the row: a read beyond it is an error to the sanitizer.
  std::vector<T> out(x.size());
  kLoops.of[dtype].from_float(x.data(), int64_t(x.size()), out.data());
  return out;
}

template <typename T>
void check(unsigned seed, int dtype) {
  std::mt19937 random(seed * 3 + dtype);
  std::normal_distribution<float> normal(0, 4);
  const int64_t n = 1 + random() % 300;
  std::vector<float> x(n), y(n);
  for (int64_t i = 0; i < n; ++i) {
    x[i] = random() % 8 == 0 ? -kInf : normal(random);
    y[i] = random() % 8 == 0 ? -kInf : normal(random);
  }
  x[random() % n] = 1;
  y[random() % n] = 2;
  const std::vector<T> a = narrow<T>(x, dtype), b = narrow<T>(y, dtype);
  const egspo::TypedLoops& loops = kLoops.of[dtype];
  loops.to_float(a.data(), n, x.data());  // as the loops see them
  loops.to_float(b.data(), n, y.data());

  float most = -kInf;
  for (float value : x) most = std::fmax(most, value);
  expect(loops.maximum(a.data(), n) == most, seed, "maximum");
  int64_t place = 0;
  while (x[place] != most) ++place;
  expect(loops.find(a.data(), n, most) == place, seed, "find");
  expect(loops.find(a.data(), n, 1e30f) == n, seed, "find nothing");

  const Affine affine{1.25f, most * 1.25f}, other{1.5f, 6.0f}, third{0.75f, most * 0.75f};
  double total = 0, moment = 0, other_total = 0, third_moment = 0, third_total = 0;
  double reference_total = 0, difference = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double u = double(x[i]) * affine.scale - affine.shift, e = std::exp2(u);
    const double v = double(y[i]) * other.scale - other.shift;
    const double w = double(x[i]) * third.scale - third.shift;
    total += e;
    if (e > 0) moment += e * u;
    other_total += std::exp2(double(x[i]) * other.scale - other.shift);
    third_total += std::exp2(w);
    if (std::exp2(w) > 0) third_moment += std::exp2(w) * w;
    reference_total += std::exp2(v);
    if (e > 1e-37) difference += e * (u - v);
  }
  const Sums sums = loops.sums(a.data(), n, affine);
  expect(close(sums.total, total, 1e-6) && close(sums.moment, moment, 1e-5), seed, "sums");

  const SampleAffines affines{affine, other, third};
  for (const bool own : {false, true}) {
    for (const EntropyOf of : {EntropyOf::kPlain, EntropyOf::kSampling, EntropyOf::kOwn}) {
      if (of == EntropyOf::kSampling && !own) continue;
      std::vector<float> masses(n + egspo::kNoiseRoom);
      const SampleSums found = loops.sample_sums(a.data(), n, affines, own, of, masses.data());
      expect(close(found.plain, total, 1e-6), seed, "plain");
      const Affine sampling = own ? other : affine;
      for (int64_t block = 0; block * 8 < n; ++block) {  // of 8 columns
        double right = 0, mass = 0;
        for (int64_t i = block * 8; i < n && i < block * 8 + 8; ++i) {
          right += std::exp2(double(x[i]) * sampling.scale - sampling.shift);
        }
        for (int64_t i = 0; i < loops.block_lanes; ++i) mass += masses[block * loops.block_lanes + i];
        expect(close(mass, right, 1e-6), seed, "mass of a block");
      }
      const double entropy = of == EntropyOf::kPlain      ? total
                             : of == EntropyOf::kSampling ? other_total
                                                          : third_total;
      expect(close(found.entropy, entropy, 1e-6), seed, "entropy");
      if (of == EntropyOf::kOwn) {
        expect(close(found.moment, third_moment, 1e-5), seed, "moment");
      }
    }
  }

  const PairSums pair = loops.pair_sums(a.data(), b.data(), n, affine, other);
  expect(close(pair.total, total, 1e-6), seed, "pair total");
  expect(close(pair.reference_total, reference_total, 1e-6), seed, "reference total");
  expect(close(pair.difference, difference, 1e-5), seed, "difference");

  const double precision = dtype == 0 ? 3e-6 : dtype == 1 ? 5e-3 : 1e-3;
  for (const bool paired : {false, true}) {
    const GradientTerms terms{affine, other, 0.5f, -1.5f, 0.25f, paired ? 0.125f : 0.0f};
    std::vector<T> gradient(n);
    std::vector<float> written(n);
    loops.gradient(a.data(), paired ? b.data() : nullptr, n, terms, gradient.data());
    loops.to_float(gradient.data(), n, written.data());
    for (int64_t i = 0; i < n; ++i) {
      const double u = double(x[i]) * affine.scale - affine.shift, p = 0.5 * std::exp2(u);
      double right = p > 0 ? p * (-1.5 + 0.25 * u) : 0;
      if (paired && p > 0) right += p * 0.125 * (u - (double(y[i]) * other.scale - other.shift));
      expect(close(written[i], right, precision), seed, "gradient");
    }
  }
}

// Rounded to nearest even, of every half and the midpoints between them.
void check_halves() {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const Float16 half{uint16_t(bits)};
    const float value = half_to_float(half);
    expect(float_to_half(value).bits == bits, bits, "half");
    const float next = half_to_float({uint16_t(bits + 1)});
    if (bits + 1 == 0x7c00) break;
    const uint16_t even = uint16_t(bits + (bits & 1));
    expect(float_to_half((value + next) / 2).bits == even, bits, "midpoint of halves");
    expect(float_to_half(-value).bits == (bits | 0x8000), bits, "negative half");
  }
  expect(float_to_half(65520.0f).bits == 0x7c00 && float_to_half(65519.0f).bits == 0x7bff, 0,
         "overflow of a half");
}

void check_noise(unsigned seed) {
  const int64_t n = 1 + seed % 70;
  std::vector<float> out(n + egspo::kNoiseRoom), scores(n), x(n, 0.0f);
  kLoops.noise(seed * 0x9E3779B97F4A7C15ull, seed, ~uint64_t{seed}, 0x80000000u, n, out.data());
  kLoops.scores(x.data(), out.data(), n, {1.0f, -1.0f}, scores.data());
  for (int64_t i = 0; i < n; ++i) {
    expect(out[i] > 0 && out[i] < 17, seed, "noise");
    expect(close(scores[i], 2.0 / out[i], 1e-6), seed, "scores");
  }
  // The words of a counter do not depend on how many are asked for.
  std::vector<float> one(4 + egspo::kNoiseRoom);
  const uint32_t group = 0x80000000u + uint32_t((n - 1) / 4);
  kLoops.noise(seed * 0x9E3779B97F4A7C15ull, seed, ~uint64_t{seed}, group, 4, one.data());
  expect(one[(n - 1) % 4] == out[n - 1], seed, "noise of a counter");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const unsigned first = unsigned(std::atoi(argv[1])), last = unsigned(std::atoi(argv[2]));
  check_halves();
  for (unsigned seed = first; seed < last; ++seed) {
    check<float>(seed, 0);
    check<BFloat16>(seed, 1);
    check<Float16>(seed, 2);
    check_noise(seed);
  }
  std::printf("%u cases passed\n", last - first);
}
