// Softmax statistics, samples and gradients of rows of logits, on the CPU.
//
// A row is cut into segments of a constant size, which are reduced in vectors of the widest kind
// that the processor has and combined in order, in double: what a row gives does not depend on the
// number of rows or of threads. Half-precision logits are computed in float.
//
// All functions are plain C, keep no state, may run in several threads at once, and return an
// egspo_status. Outputs may be null where that is said; logits are read once from memory.
#ifndef EGSPO_ROWS_H_
#define EGSPO_ROWS_H_

#include "select_steps.h"

#ifdef __cplusplus
extern "C" {
#endif

// Values of `dtype`.
enum { EGSPO_FLOAT32 = 0, EGSPO_BFLOAT16 = 1, EGSPO_FLOAT16 = 2 };

// Runs body(data) once in each of `threads` threads, of which the caller is one: GOMP_parallel of
// the OpenMP runtime that the process already has. With null the library starts threads of its own
// for the call. `flags` is 0.
typedef void (*egspo_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Rows of logits as every function below takes them.
//   logits       [rows, vocab], rows `row_stride` elements apart and contiguous inside
//   banned       column that counts as -inf, or -1
//   temperature  > 0 (>= 0 for samples, where 0 is greedy)
typedef struct {
  egspo_parallel parallel;
  int64_t threads;
  const void* logits;
  int64_t dtype;
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;
  int64_t banned;
  double temperature;
} egspo_rows;

// Statistics of `count` rows, those of `row_index` or (null) all of them in order.
//   targets     [count]; null: none. One out of range has log-probability NaN
//   log_prob    [count], written if there are targets
//   maximum, total  [count], written unless null: the largest logit and the sum of exponentials
//               below it, from which egspo_row_gradient makes the softmax again
// A row index out of range gives NaN.
EGSPO_EXPORT int32_t egspo_token_stats(const egspo_rows* rows, const int64_t* row_index,
                                       int64_t count, const int64_t* targets, float* logsumexp,
                                       float* entropy, float* log_prob, int64_t* argmax,
                                       float* confidence, float* maximum,
                                       float* total) EGSPO_NOEXCEPT;

// One sample of each row, as egspo_kernels/reference/sampling.py defines it.
EGSPO_EXPORT int32_t egspo_sample_tokens(const egspo_rows* rows, const int64_t* row_ids,
                                         int64_t seed, int64_t step, double entropy_temperature,
                                         int64_t* token, float* log_prob, float* confidence,
                                         float* entropy) EGSPO_NOEXCEPT;

// Log-probabilities and the KL divergence of each row to the same row of `reference`, which has
// the same sizes, banned column and temperature.
//   mean_difference  [rows]: E[x - y] at the temperature, each below its own largest logit
EGSPO_EXPORT int32_t egspo_row_divergence(const egspo_rows* rows, const egspo_rows* reference,
                                          const int64_t* targets, float* log_prob, float* kl,
                                          float* maximum, float* total, float* reference_maximum,
                                          float* mean_difference) EGSPO_NOEXCEPT;

// What the gradient of a row is made of; [rows] each, a gradient null where it has no part in the
// loss. `entropy` goes with its gradient; reference, its maximum and mean_difference with the KL's.
typedef struct {
  const int64_t* targets;
  const float* maximum;
  const float* total;
  const float* entropy;
  const egspo_rows* reference;
  const float* reference_maximum;
  const float* mean_difference;
  const float* grad_logsumexp;
  const float* grad_entropy;
  const float* grad_log_prob;
  const float* grad_kl;
} egspo_row_gradients;

// Gradient with respect to the logits, in their dtype; `gradient` [rows, vocab] may be the logits.
EGSPO_EXPORT int32_t egspo_row_gradient(const egspo_rows* rows, const egspo_row_gradients* of,
                                        void* gradient, int64_t gradient_stride) EGSPO_NOEXCEPT;

// Name of the vector instructions in use: "avx512", "avx2" or "baseline".
EGSPO_EXPORT const char* egspo_vector_instructions(void) EGSPO_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif  // EGSPO_ROWS_H_
