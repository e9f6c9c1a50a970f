// The step selector on CUDA devices: the functions of select_steps.h, with the same results.
//
// Every array lies in memory of the current device. A call launches one kernel on `stream` (a
// cudaStream_t) and returns without waiting for it. In addition to the limits of the CPU functions,
// `batch` and `steps` are at most EGSPO_CUDA_MOST.
//
// The functions return an egspo_status or, when CUDA refuses the launch, EGSPO_CUDA_ERROR plus its
// cudaError_t.
#ifndef EGSPO_SELECT_STEPS_CUDA_H_
#define EGSPO_SELECT_STEPS_CUDA_H_

#include "select_steps.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EGSPO_CUDA_ERROR 1000
#define EGSPO_CUDA_MOST 2147483647
// Of the workspace, for each step of each row.
#define EGSPO_CUDA_WORKSPACE_BYTES 16

// EGSPO_OK if the kernels can run on the current device. Loads them.
EGSPO_EXPORT int32_t egspo_cuda_check(void) EGSPO_NOEXCEPT;

// Name and description of a returned value above EGSPO_CUDA_ERROR, never null.
EGSPO_EXPORT const char* egspo_cuda_error_name(int32_t status) EGSPO_NOEXCEPT;
EGSPO_EXPORT const char* egspo_cuda_error_string(int32_t status) EGSPO_NOEXCEPT;

EGSPO_EXPORT int32_t egspo_cuda_select_steps_f32(const float* entropy, int64_t batch, int64_t steps,
                                                 int64_t row_stride, const int64_t* limits,
                                                 int64_t k, int64_t* indices,
                                                 void* stream) EGSPO_NOEXCEPT;
EGSPO_EXPORT int32_t egspo_cuda_select_steps_f64(const double* entropy, int64_t batch,
                                                 int64_t steps, int64_t row_stride,
                                                 const int64_t* limits, int64_t k, int64_t* indices,
                                                 void* stream) EGSPO_NOEXCEPT;

//   workspace  [batch, steps] of EGSPO_CUDA_WORKSPACE_BYTES each, aligned to as many; overwritten
EGSPO_EXPORT int32_t egspo_cuda_select_steps_segmented_f32(
    const float* token_entropy, const int64_t* step_ids, int64_t batch, int64_t tokens,
    int64_t row_stride, int64_t steps, int32_t reduce, const int64_t* limits, int64_t k,
    int64_t* indices, void* workspace, void* stream) EGSPO_NOEXCEPT;
EGSPO_EXPORT int32_t egspo_cuda_select_steps_segmented_f64(
    const double* token_entropy, const int64_t* step_ids, int64_t batch, int64_t tokens,
    int64_t row_stride, int64_t steps, int32_t reduce, const int64_t* limits, int64_t k,
    int64_t* indices, void* workspace, void* stream) EGSPO_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif  // EGSPO_SELECT_STEPS_CUDA_H_
