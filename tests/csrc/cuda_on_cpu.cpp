// The interface of the CUDA library, run on the CPU by the algorithm of the CUDA library: a library
// to test its Python side without a GPU. Arrays are in host memory, the stream is not used.
#include <algorithm>
#include <memory>

#include "select_steps_block.h"
#include "select_steps_cuda.h"

namespace {

struct SequentialBlock {
  int threads() const { return 64; }
  template <typename Phase>
  void parallel(Phase phase) {
    for (int thread = 0; thread < threads(); ++thread) phase(thread);
  }
  int broadcast(const int* shared) { return *shared; }
  int fetch_add(int* shared, int value) {
    *shared += value;
    return *shared - value;
  }
};

int row_limit(const int64_t* limits, int64_t row, int64_t steps) {
  return static_cast<int>(limits == nullptr ? steps : std::clamp<int64_t>(limits[row], 0, steps));
}

template <typename Source>
void select_row(const Source& source, int limit, int64_t k, int64_t* indices) {
  constexpr int kItems = 2;
  const auto shared = std::make_unique<egspo::SharedKeys<typename Source::Key, kItems * 64>>();
  SequentialBlock block;
  egspo::select_row<kItems>(block, source, limit, static_cast<int>(k), indices, *shared);
}

template <typename Value>
int32_t select_steps(const Value* entropy, int64_t batch, int64_t steps, int64_t row_stride,
                     const int64_t* limits, int64_t k, int64_t* indices) {
  for (int64_t row = 0; row < batch; ++row) {
    select_row(egspo::StepValues<Value>{entropy + row * row_stride}, row_limit(limits, row, steps),
               k, indices + row * k);
  }
  return EGSPO_OK;
}

template <typename Value>
int32_t select_segmented(const Value* token_entropy, const int64_t* step_ids, int64_t batch,
                         int64_t tokens, int64_t row_stride, int64_t steps, int32_t reduce,
                         const int64_t* limits, int64_t k, int64_t* indices, void* workspace) {
  const auto tile = std::make_unique<egspo::TokenTile>();
  for (int64_t row = 0; row < batch; ++row) {
    egspo::StepSum* const sums = static_cast<egspo::StepSum*>(workspace) + row * steps;
    const int limit = row_limit(limits, row, steps);
    SequentialBlock block;
    egspo::sum_steps(block, token_entropy + row * row_stride, step_ids + row * tokens, tokens,
                     limit, reduce == EGSPO_REDUCE_MEAN, sums, *tile);
    select_row(egspo::StepSums{sums}, limit, k, indices + row * k);
  }
  return EGSPO_OK;
}

}  // namespace

int32_t egspo_abi_version(void) noexcept { return EGSPO_ABI_VERSION; }
int32_t egspo_cuda_check(void) noexcept { return EGSPO_OK; }
const char* egspo_cuda_error_name(int32_t) noexcept { return "name"; }
const char* egspo_cuda_error_string(int32_t) noexcept { return "description"; }

int32_t egspo_cuda_select_steps_f32(const float* entropy, int64_t batch, int64_t steps,
                                    int64_t row_stride, const int64_t* limits, int64_t k,
                                    int64_t* indices, void*) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices);
}

int32_t egspo_cuda_select_steps_f64(const double* entropy, int64_t batch, int64_t steps,
                                    int64_t row_stride, const int64_t* limits, int64_t k,
                                    int64_t* indices, void*) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices);
}

int32_t egspo_cuda_select_steps_segmented_f32(const float* token_entropy, const int64_t* step_ids,
                                              int64_t batch, int64_t tokens, int64_t row_stride,
                                              int64_t steps, int32_t reduce, const int64_t* limits,
                                              int64_t k, int64_t* indices, void* workspace,
                                              void*) noexcept {
  return select_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce, limits,
                          k, indices, workspace);
}

int32_t egspo_cuda_select_steps_segmented_f64(const double* token_entropy, const int64_t* step_ids,
                                              int64_t batch, int64_t tokens, int64_t row_stride,
                                              int64_t steps, int32_t reduce, const int64_t* limits,
                                              int64_t k, int64_t* indices, void* workspace,
                                              void*) noexcept {
  return select_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce, limits,
                          k, indices, workspace);
}
