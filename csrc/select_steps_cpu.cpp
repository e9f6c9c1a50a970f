#include "select_steps.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "select_steps_checks.h"

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "NaN has a defined rank here: compile without -ffast-math and -ffinite-math-only"
#endif

namespace {

using egspo::valid_matrix;

int64_t row_limit(const int64_t* limits, int64_t row, int64_t steps) {
  return limits == nullptr ? steps : std::clamp<int64_t>(limits[row], 0, steps);
}

// Writes the best k of the candidates in [0, limit), best first, then -1. The output row is kept
// sorted: a step moves up past those that it ranks before, few where k is small and ever fewer as
// the row goes on. Halving the row instead is slower up to k = 256, by branches that no processor
// foresees.
template <typename Value, typename IsCandidate>
void select_row(const Value* values, int64_t limit, int64_t k, IsCandidate is_candidate,
                int64_t* selected) {
  if (k == 0) return;
  int64_t* end = selected;
  int64_t* const capacity = selected + k;
  Value last = 0;
  for (int64_t step = 0; step < limit; ++step) {
    const Value value = values[step];
    // Most steps end here; a later step never replaces an equal one, nor does NaN a number.
    if (end == capacity && (value <= last || std::isnan(value))) continue;
    if (!is_candidate(step)) continue;
    int64_t* place = end == capacity ? end - 1 : end++;
    if (!std::isnan(value)) {
      // Before smaller numbers and NaN, after equal numbers, which came earlier.
      for (; place != selected && !(value <= values[place[-1]]); --place) *place = place[-1];
    }
    *place = step;
    last = values[end[-1]];
  }
  std::fill(end, capacity, int64_t{-1});
}

template <typename Value>
int32_t select_steps(const Value* entropy, int64_t batch, int64_t steps, int64_t row_stride,
                     const int64_t* limits, int64_t k, int64_t* indices) {
  if (!valid_matrix(entropy, batch, steps, row_stride, sizeof(Value)) ||
      !valid_matrix(indices, batch, k, k, sizeof(int64_t))) {
    return EGSPO_INVALID_ARGUMENT;
  }
  if (k == 0) return EGSPO_OK;
  const auto every_step = [](int64_t) { return true; };
  for (int64_t row = 0; row < batch; ++row) {
    // An array without elements may be null: no offset is taken from it.
    const Value* const values = steps == 0 ? entropy : entropy + row * row_stride;
    select_row(values, row_limit(limits, row, steps), k, every_step, indices + row * k);
  }
  return EGSPO_OK;
}

template <typename Value>
int32_t select_steps_segmented(const Value* token_entropy, const int64_t* step_ids, int64_t batch,
                               int64_t tokens, int64_t row_stride, int64_t steps, int32_t reduce,
                               const int64_t* limits, int64_t k, int64_t* indices) {
  const int64_t most_steps = std::numeric_limits<int64_t>::max() / int64_t{sizeof(double)};
  if (!valid_matrix(token_entropy, batch, tokens, row_stride, sizeof(Value)) ||
      !valid_matrix(step_ids, batch, tokens, tokens, sizeof(int64_t)) ||
      !valid_matrix(indices, batch, k, k, sizeof(int64_t)) || steps < 0 || steps > most_steps ||
      (reduce != EGSPO_REDUCE_SUM && reduce != EGSPO_REDUCE_MEAN)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  if (batch == 0 || k == 0) return EGSPO_OK;
  const std::unique_ptr<double[]> values(new (std::nothrow) double[steps]);
  const std::unique_ptr<int64_t[]> counts(new (std::nothrow) int64_t[steps]);
  if (!values || !counts) return EGSPO_OUT_OF_MEMORY;

  for (int64_t row = 0; row < batch; ++row) {
    std::fill_n(values.get(), steps, 0.0);
    std::fill_n(counts.get(), steps, int64_t{0});
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t step = step_ids[row * tokens + token];
      if (step < 0 || step >= steps) continue;
      values[step] += token_entropy[row * row_stride + token];
      ++counts[step];
    }
    if (reduce == EGSPO_REDUCE_MEAN) {
      for (int64_t step = 0; step < steps; ++step) {
        if (counts[step] > 1) values[step] /= static_cast<double>(counts[step]);
      }
    }
    const auto has_token = [&counts](int64_t step) { return counts[step] > 0; };
    select_row(values.get(), row_limit(limits, row, steps), k, has_token, indices + row * k);
  }
  return EGSPO_OK;
}

}  // namespace

int32_t egspo_abi_version(void) noexcept { return EGSPO_ABI_VERSION; }

int32_t egspo_select_steps_f32(const float* entropy, int64_t batch, int64_t steps,
                               int64_t row_stride, const int64_t* limits, int64_t k,
                               int64_t* indices) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices);
}

int32_t egspo_select_steps_f64(const double* entropy, int64_t batch, int64_t steps,
                               int64_t row_stride, const int64_t* limits, int64_t k,
                               int64_t* indices) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices);
}

int32_t egspo_select_steps_segmented_f32(const float* token_entropy, const int64_t* step_ids,
                                         int64_t batch, int64_t tokens, int64_t row_stride,
                                         int64_t steps, int32_t reduce, const int64_t* limits,
                                         int64_t k, int64_t* indices) noexcept {
  return select_steps_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce,
                                limits, k, indices);
}

int32_t egspo_select_steps_segmented_f64(const double* token_entropy, const int64_t* step_ids,
                                         int64_t batch, int64_t tokens, int64_t row_stride,
                                         int64_t steps, int32_t reduce, const int64_t* limits,
                                         int64_t k, int64_t* indices) noexcept {
  return select_steps_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce,
                                limits, k, indices);
}
