// What the programs in this folder share: the specification of the selector, and random cases.
#pragma once

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <vector>

namespace oracle {

using Indices = std::vector<int64_t>;

// One entropy per step; none for a step that is no candidate.
using Entropies = std::vector<std::optional<double>>;

// By value, then by step (a stable sort); NaN after every number; -1 for what is missing.
inline Indices select(const Entropies& entropies, int64_t limit, int64_t k) {
  Indices order;
  for (int64_t step = 0; step < limit; ++step) {
    if (entropies[step]) order.push_back(step);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = *entropies[a], y = *entropies[b];
    return std::isnan(x) || std::isnan(y) ? !std::isnan(x) && std::isnan(y) : x > y;
  });
  order.resize(k, -1);
  return order;
}

template <typename Value>
Entropies per_step(const Value* values, int64_t steps) {
  return Entropies(values, values + steps);
}

template <typename Value>
Entropies reduced(const Value* values, const int64_t* step_ids, int64_t tokens, int64_t steps,
                  bool mean) {
  Entropies entropies(steps);
  std::vector<int64_t> counts(steps);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t step = step_ids[token];
    if (step < 0 || step >= steps) continue;
    entropies[step] = entropies[step].value_or(0.0) + static_cast<double>(values[token]);
    ++counts[step];
  }
  for (int64_t step = 0; step < steps; ++step) {
    if (mean && entropies[step]) *entropies[step] /= static_cast<double>(counts[step]);
  }
  return entropies;
}

// ---- Random cases ------------------------------------------------------------------------------

struct Random {
  std::mt19937_64 engine;

  explicit Random(uint64_t seed) : engine(seed) {}

  int64_t integer(int64_t low, int64_t high) {  // both included
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine); }
};

// Fills values[0, size) in one of several styles: ties, special numbers, any bits, trends.
template <typename Value>
void fill(Random& random, Value* values, int64_t size) {
  using Limits = std::numeric_limits<Value>;
  const Value special[] = {Value(0),           -Value(0),         Value(1),
                           Value(1.5),         -Value(1),         Limits::infinity(),
                           -Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN(),
                           Limits::denorm_min(), Limits::max(),     Limits::lowest()};
  const int64_t style = random.integer(0, 5);
  for (int64_t i = 0; i < size; ++i) {
    switch (style) {
      case 0:
        values[i] = special[random.integer(0, std::size(special) - 1)];
        break;
      case 1: {  // any pattern of bits: NaN payloads, subnormal numbers
        const uint64_t bits = random.engine();
        std::memcpy(&values[i], &bits, sizeof(Value));
        break;
      }
      case 2:
        values[i] = Value(random.integer(0, 3)) / 2;
        break;
      case 3:
        values[i] = Value(i);  // every step beats those before it
        break;
      case 4:
        values[i] = Value(-i);
        break;
      default:
        values[i] = Value(std::uniform_real_distribution<double>(0, 12)(random.engine));
    }
  }
}

// Numbers in and out of [0, size).
inline int64_t any_index(Random& random, int64_t size) {
  if (random.chance(0.9) && size > 0) return random.integer(0, size - 1);
  const int64_t odd[] = {-1, -2, size, size + 1, INT64_MIN, INT64_MAX, INT64_C(1) << 32};
  return odd[random.integer(0, std::size(odd) - 1)];
}

// ---- Running -----------------------------------------------------------------------------------

inline uint64_t current_seed = 0;

inline void report_seed() {
  std::fprintf(stderr, "failing seed: %llu\n", static_cast<unsigned long long>(current_seed));
}

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  report_seed();
  std::exit(1);
}

// Runs `one(seed)` for the seeds that the command line names: PROGRAM FIRST_SEED COUNT.
template <typename One>
int run_seeds(int argc, char** argv, One one) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s FIRST_SEED COUNT\n", argv[0]);
    return 2;
  }
  __sanitizer_set_death_callback(report_seed);
  const uint64_t first = std::strtoull(argv[1], nullptr, 10);
  const uint64_t count = std::strtoull(argv[2], nullptr, 10);
  for (current_seed = first; current_seed < first + count; ++current_seed) one(current_seed);
  std::printf("%llu cases passed\n", static_cast<unsigned long long>(count));
  return 0;
}

}  // namespace oracle
