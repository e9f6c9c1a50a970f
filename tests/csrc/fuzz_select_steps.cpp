// Random calls of the CPU library, good and bad, against the oracle. Arrays are exactly as long as
// the interface says, on the heap, where the address sanitizer watches their ends.
#include "oracle.h"
#include "select_steps.h"

namespace {

using oracle::check;
using oracle::Indices;
using oracle::Random;

constexpr int64_t kUnwritten = 77;

template <typename T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(size > 0 ? new T[size] : nullptr);
}

int32_t call_steps(const float* values, int64_t batch, int64_t steps, int64_t stride,
                   const int64_t* limits, int64_t k, int64_t* indices) {
  return egspo_select_steps_f32(values, batch, steps, stride, limits, k, indices);
}
int32_t call_steps(const double* values, int64_t batch, int64_t steps, int64_t stride,
                   const int64_t* limits, int64_t k, int64_t* indices) {
  return egspo_select_steps_f64(values, batch, steps, stride, limits, k, indices);
}
int32_t call_segmented(const float* values, const int64_t* ids, int64_t batch, int64_t tokens,
                       int64_t stride, int64_t steps, int32_t reduce, const int64_t* limits,
                       int64_t k, int64_t* indices) {
  return egspo_select_steps_segmented_f32(values, ids, batch, tokens, stride, steps, reduce, limits,
                                          k, indices);
}
int32_t call_segmented(const double* values, const int64_t* ids, int64_t batch, int64_t tokens,
                       int64_t stride, int64_t steps, int32_t reduce, const int64_t* limits,
                       int64_t k, int64_t* indices) {
  return egspo_select_steps_segmented_f64(values, ids, batch, tokens, stride, steps, reduce, limits,
                                          k, indices);
}

struct Shape {
  int64_t batch, columns, stride, steps, k;

  // k may exceed the steps: the C interface then pads.
  Shape(Random& random, bool segmented) {
    batch = random.integer(0, 4);
    columns = random.chance(0.1) ? random.integer(0, 300) : random.integer(0, 20);
    stride = columns + random.integer(0, 3);
    if (random.chance(0.1)) stride = 0;  // every row the same
    steps = segmented ? random.integer(0, 24) : columns;
    k = random.integer(0, steps + 2);
  }
  int64_t elements() const { return batch == 0 ? 0 : (batch - 1) * stride + columns; }
};

std::unique_ptr<int64_t[]> any_limits(Random& random, const Shape& shape) {
  if (random.chance(0.3)) return nullptr;
  auto limits = array<int64_t>(shape.batch);
  for (int64_t row = 0; row < shape.batch; ++row) {
    limits[row] = oracle::any_index(random, shape.steps + 1);
  }
  return limits;
}

int64_t limit_of(const int64_t* limits, int64_t row, int64_t steps) {
  return limits == nullptr ? steps : std::min(std::max<int64_t>(limits[row], 0), steps);
}

template <typename Value>
void good_call(Random& random) {
  const Shape shape(random, false);
  const auto values = array<Value>(shape.elements());
  oracle::fill(random, values.get(), shape.elements());
  const auto limits = any_limits(random, shape);
  const auto indices = array<int64_t>(shape.batch * shape.k);
  check(call_steps(values.get(), shape.batch, shape.steps, shape.stride, limits.get(), shape.k,
                   indices.get()) == EGSPO_OK,
        "status of a good call");
  for (int64_t row = 0; row < shape.batch; ++row) {
    const int64_t limit = limit_of(limits.get(), row, shape.steps);
    const auto entropies = oracle::per_step(values.get() + row * shape.stride, shape.steps);
    const int64_t* const found = indices.get() + row * shape.k;
    check(Indices(found, found + shape.k) == oracle::select(entropies, limit, shape.k),
          "selection from steps");
  }
}

template <typename Value>
void good_segmented_call(Random& random) {
  const Shape shape(random, true);
  const int64_t tokens = shape.columns;
  const auto values = array<Value>(shape.elements());
  oracle::fill(random, values.get(), shape.elements());
  const auto step_ids = array<int64_t>(shape.batch * tokens);
  for (int64_t i = 0; i < shape.batch * tokens; ++i) {
    step_ids[i] = oracle::any_index(random, shape.steps);
  }
  const auto limits = any_limits(random, shape);
  const auto indices = array<int64_t>(shape.batch * shape.k);
  const bool mean = random.chance(0.5);
  check(call_segmented(values.get(), step_ids.get(), shape.batch, tokens, shape.stride, shape.steps,
                       mean ? EGSPO_REDUCE_MEAN : EGSPO_REDUCE_SUM, limits.get(), shape.k,
                       indices.get()) == EGSPO_OK,
        "status of a good segmented call");
  for (int64_t row = 0; row < shape.batch; ++row) {
    const int64_t limit = limit_of(limits.get(), row, shape.steps);
    const Value* const row_values = values.get() + row * shape.stride;
    const int64_t* const row_ids = step_ids.get() + row * tokens;
    const auto entropies = oracle::reduced(row_values, row_ids, tokens, shape.steps, mean);
    const int64_t* const found = indices.get() + row * shape.k;
    check(Indices(found, found + shape.k) == oracle::select(entropies, limit, shape.k),
          "selection from tokens");
  }
}

// One argument of an otherwise good call is impossible: an error, and nothing written.
template <typename Value>
void bad_call(Random& random) {
  const int64_t size = random.integer(1, 8);
  const auto values = array<Value>(3 * size);
  oracle::fill(random, values.get(), 3 * size);
  const auto step_ids = array<int64_t>(3 * size);
  std::fill_n(step_ids.get(), 3 * size, int64_t{0});
  const auto indices = array<int64_t>(3 * size);
  std::fill_n(indices.get(), 3 * size, kUnwritten);

  const int64_t impossible[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 2, INT64_C(1) << 61};
  const int64_t bad = impossible[random.integer(0, std::size(impossible) - 1)];
  const Value* entropy = values.get();
  const int64_t* ids = step_ids.get();
  int64_t* written = indices.get();
  int64_t batch = 3, columns = size, stride = size, steps = size, k = size;
  int32_t reduce = EGSPO_REDUCE_SUM;
  const bool segmented = random.chance(0.5);
  switch (random.integer(0, segmented ? 8 : 5)) {
    case 0: entropy = nullptr; break;
    case 1: written = nullptr; break;
    case 2: batch = bad; break;
    case 3: (segmented ? columns : steps) = bad; break;
    case 4: stride = bad; break;
    case 5: k = bad; break;
    case 6: ids = nullptr; break;
    case 7: steps = bad; break;
    default: reduce = random.chance(0.5) ? -1 : 2;
  }
  const int32_t status =
      segmented ? call_segmented(entropy, ids, batch, columns, stride, steps, reduce, nullptr, k,
                                 written)
                : call_steps(entropy, batch, steps, stride, nullptr, k, written);
  check(status == EGSPO_INVALID_ARGUMENT, "status of a bad call");
  check(std::all_of(indices.get(), indices.get() + 3 * size,
                    [](int64_t index) { return index == kUnwritten; }),
        "a refused call writes nothing");
}

}  // namespace

int main(int argc, char** argv) {
  return oracle::run_seeds(argc, argv, [](uint64_t seed) {
    Random random(seed);
    good_call<float>(random);
    good_call<double>(random);
    good_segmented_call<float>(random);
    good_segmented_call<double>(random);
    bad_call<float>(random);
    bad_call<double>(random);
  });
}
