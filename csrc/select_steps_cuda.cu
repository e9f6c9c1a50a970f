// Launches select_steps_block.h: one block per row.
#include "select_steps_cuda.h"

#include <cuda_runtime.h>

#include "select_steps_block.h"
#include "select_steps_checks.h"

namespace {

using egspo::KeyFor;
using egspo::SharedKeys;
using egspo::StepSum;
using egspo::StepSums;
using egspo::StepValues;
using egspo::TokenTile;
using egspo::valid_matrix;
using egspo::WideKey;

static_assert(sizeof(StepSum) == EGSPO_CUDA_WORKSPACE_BYTES);

// The threads of this block, as select_steps_block.h wants them.
struct CudaBlock {
  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }

  template <typename Phase>
  __device__ __forceinline__ void parallel(Phase phase) {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  __device__ __forceinline__ int broadcast(const int* shared) {
    const int value = *shared;
    __syncthreads();
    return value;
  }

  __device__ __forceinline__ int fetch_add(int* shared, int value) {
    return atomicAdd(shared, value);
  }
};

// Two shapes of block. Up to 1,024 steps each thread has one key: the fewest dependent steps, which
// is what a short row costs. Longer rows get several keys per thread, whose loads and merges
// overlap; both key types then fill 32 KiB, which every device grants without being asked.
template <typename Key>
struct Short {
  static constexpr int kThreads = 1024, kItems = 1;
};
template <typename Key>
struct Long {
  static constexpr int kThreads = 512, kItems = 32 / sizeof(Key);
};
template <typename Shape>
constexpr int kCapacity = Shape::kThreads * Shape::kItems;

struct Selection {
  const int64_t* limits;
  int64_t* indices;
  int steps;
  int k;

  __device__ __forceinline__ int row_limit(int64_t row) const {
    if (limits == nullptr) return steps;
    const int64_t limit = limits[row];
    return limit < 0 ? 0 : limit > steps ? steps : static_cast<int>(limit);
  }
  __device__ __forceinline__ int64_t* row_indices(int64_t row) const { return indices + row * k; }
};

template <typename Value, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    select_kernel(const Value* __restrict__ entropy, int64_t row_stride, Selection selection) {
  __shared__ SharedKeys<typename KeyFor<Value>::type, kCapacity<Shape>> shared;
  const int64_t row = blockIdx.x;
  CudaBlock block;
  const StepValues<Value> source{entropy + row * row_stride};
  egspo::select_row<Shape::kItems>(block, source, selection.row_limit(row), selection.k,
                                   selection.row_indices(row), shared);
}

template <typename Value, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    select_segmented_kernel(const Value* __restrict__ token_entropy,
                            const int64_t* __restrict__ step_ids, int64_t tokens,
                            int64_t row_stride, bool mean, StepSum* workspace,
                            Selection selection) {
  __shared__ SharedKeys<WideKey, kCapacity<Shape>> shared;
  __shared__ TokenTile tile;
  const int64_t row = blockIdx.x;
  CudaBlock block;
  const int limit = selection.row_limit(row);
  StepSum* const sums = workspace + row * selection.steps;
  egspo::sum_steps(block, token_entropy + row * row_stride, step_ids + row * tokens, tokens, limit,
                   mean, sums, tile);
  egspo::select_row<Shape::kItems>(block, StepSums{sums}, limit, selection.k,
                                   selection.row_indices(row), shared);
}

int32_t status_of(cudaError_t error) {
  return error == cudaSuccess ? EGSPO_OK : EGSPO_CUDA_ERROR + static_cast<int32_t>(error);
}

bool valid_selection(int64_t batch, int64_t steps, int64_t k, const int64_t* indices) {
  return valid_matrix(indices, batch, k, k, sizeof(int64_t)) && batch <= EGSPO_CUDA_MOST &&
         steps >= 0 && steps <= EGSPO_CUDA_MOST && k <= EGSPO_CUDA_MOST;
}

// Threads of a block of the Short shape: whole warps, at least one key each.
unsigned short_threads(int64_t keys) { return static_cast<unsigned>((keys + 31) / 32 * 32); }

template <typename Value>
int32_t select_steps(const Value* entropy, int64_t batch, int64_t steps, int64_t row_stride,
                     const int64_t* limits, int64_t k, int64_t* indices, void* stream) {
  if (!valid_matrix(entropy, batch, steps, row_stride, sizeof(Value)) ||
      !valid_selection(batch, steps, k, indices)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  if (batch == 0 || k == 0) return EGSPO_OK;
  using Key = typename KeyFor<Value>::type;
  const Selection selection{limits, indices, static_cast<int>(steps), static_cast<int>(k)};
  const auto blocks = static_cast<unsigned>(batch);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t keys = steps > k ? steps : k;
  if (keys <= kCapacity<Short<Key>>) {
    select_kernel<Value, Short<Key>>
        <<<blocks, short_threads(keys), 0, on>>>(entropy, row_stride, selection);
  } else {
    select_kernel<Value, Long<Key>>
        <<<blocks, Long<Key>::kThreads, 0, on>>>(entropy, row_stride, selection);
  }
  return status_of(cudaGetLastError());
}

template <typename Value>
int32_t select_steps_segmented(const Value* token_entropy, const int64_t* step_ids, int64_t batch,
                               int64_t tokens, int64_t row_stride, int64_t steps, int32_t reduce,
                               const int64_t* limits, int64_t k, int64_t* indices, void* workspace,
                               void* stream) {
  if (!valid_matrix(token_entropy, batch, tokens, row_stride, sizeof(Value)) ||
      !valid_matrix(step_ids, batch, tokens, tokens, sizeof(int64_t)) ||
      !valid_matrix(workspace, batch, steps, steps, sizeof(StepSum)) ||
      !valid_selection(batch, steps, k, indices) ||
      (reduce != EGSPO_REDUCE_SUM && reduce != EGSPO_REDUCE_MEAN)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  if (batch == 0 || k == 0) return EGSPO_OK;
  const Selection selection{limits, indices, static_cast<int>(steps), static_cast<int>(k)};
  const bool mean = reduce == EGSPO_REDUCE_MEAN;
  const auto sums = static_cast<StepSum*>(workspace);
  const auto blocks = static_cast<unsigned>(batch);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t keys = steps > k ? steps : k;
  if (keys <= kCapacity<Short<WideKey>>) {
    // Few steps may have many tokens: enough threads for a tile of them.
    const int64_t tile = tokens < egspo::kTokenTile ? tokens : egspo::kTokenTile;
    const unsigned threads = short_threads(keys > tile ? keys : tile);
    select_segmented_kernel<Value, Short<WideKey>><<<blocks, threads, 0, on>>>(
        token_entropy, step_ids, tokens, row_stride, mean, sums, selection);
  } else {
    select_segmented_kernel<Value, Long<WideKey>><<<blocks, Long<WideKey>::kThreads, 0, on>>>(
        token_entropy, step_ids, tokens, row_stride, mean, sums, selection);
  }
  return status_of(cudaGetLastError());
}

template <typename... Kernels>
cudaError_t load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  const auto load_one = [&](auto kernel) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  };
  (load_one(kernels), ...);
  return error;
}

template <typename Value>
cudaError_t load_kernels_for() {
  using Key = typename KeyFor<Value>::type;
  return load(select_kernel<Value, Short<Key>>, select_kernel<Value, Long<Key>>,
              select_segmented_kernel<Value, Short<WideKey>>,
              select_segmented_kernel<Value, Long<WideKey>>);
}

}  // namespace

int32_t egspo_abi_version(void) noexcept { return EGSPO_ABI_VERSION; }

int32_t egspo_cuda_check(void) noexcept {
  cudaError_t error = load_kernels_for<float>();
  if (error == cudaSuccess) error = load_kernels_for<double>();
  cudaGetLastError();  // what is reported here is not the error of a later call
  return status_of(error);
}

const char* egspo_cuda_error_name(int32_t status) noexcept {
  return cudaGetErrorName(static_cast<cudaError_t>(status - EGSPO_CUDA_ERROR));
}

const char* egspo_cuda_error_string(int32_t status) noexcept {
  return cudaGetErrorString(static_cast<cudaError_t>(status - EGSPO_CUDA_ERROR));
}

int32_t egspo_cuda_select_steps_f32(const float* entropy, int64_t batch, int64_t steps,
                                    int64_t row_stride, const int64_t* limits, int64_t k,
                                    int64_t* indices, void* stream) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices, stream);
}

int32_t egspo_cuda_select_steps_f64(const double* entropy, int64_t batch, int64_t steps,
                                    int64_t row_stride, const int64_t* limits, int64_t k,
                                    int64_t* indices, void* stream) noexcept {
  return select_steps(entropy, batch, steps, row_stride, limits, k, indices, stream);
}

int32_t egspo_cuda_select_steps_segmented_f32(const float* token_entropy, const int64_t* step_ids,
                                              int64_t batch, int64_t tokens, int64_t row_stride,
                                              int64_t steps, int32_t reduce, const int64_t* limits,
                                              int64_t k, int64_t* indices, void* workspace,
                                              void* stream) noexcept {
  return select_steps_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce,
                                limits, k, indices, workspace, stream);
}

int32_t egspo_cuda_select_steps_segmented_f64(const double* token_entropy, const int64_t* step_ids,
                                              int64_t batch, int64_t tokens, int64_t row_stride,
                                              int64_t steps, int32_t reduce, const int64_t* limits,
                                              int64_t k, int64_t* indices, void* workspace,
                                              void* stream) noexcept {
  return select_steps_segmented(token_entropy, step_ids, batch, tokens, row_stride, steps, reduce,
                                limits, k, indices, workspace, stream);
}
