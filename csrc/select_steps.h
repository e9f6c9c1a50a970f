// Selection of the K highest-entropy denoising steps of every trajectory.
//
// Order: by value, highest first (+inf is the highest number, -inf the lowest, -0 equals +0); equal
// values by earlier step; NaN after every number, NaNs among themselves by earlier step. A row with
// fewer than k candidates ends in -1.
//
// All functions are plain C, keep no state, may run in several threads at once, and return an
// egspo_status. They read nothing outside the arrays described here, whatever limits and step ids
// hold.
#ifndef EGSPO_SELECT_STEPS_H_
#define EGSPO_SELECT_STEPS_H_

#include <stdint.h>

#ifdef __cplusplus
#define EGSPO_NOEXCEPT noexcept
extern "C" {
#else
#define EGSPO_NOEXCEPT
#endif

#define EGSPO_EXPORT __attribute__((visibility("default")))

// Raised with every incompatible change of the functions below; egspo_kernels/dispatch/extension.py holds
// the same number and refuses a library with another.
#define EGSPO_ABI_VERSION 1

typedef enum {
  EGSPO_OK = 0,
  EGSPO_INVALID_ARGUMENT = 1,  // negative or overflowing size, or a null array that is not empty
  EGSPO_OUT_OF_MEMORY = 2,
} egspo_status;

// Values of `reduce`.
enum { EGSPO_REDUCE_SUM = 0, EGSPO_REDUCE_MEAN = 1 };

EGSPO_EXPORT int32_t egspo_abi_version(void) EGSPO_NOEXCEPT;

// Selects from per-step entropies.
//   entropy    [batch, steps], rows `row_stride` elements apart and contiguous inside
//   limits     [batch]; the candidates of row b are the steps in [0, limits[b]), clamped to
//              [0, steps]. Null: every step.
//   indices    [batch, k], written
EGSPO_EXPORT int32_t egspo_select_steps_f32(const float* entropy, int64_t batch, int64_t steps,
                                            int64_t row_stride, const int64_t* limits, int64_t k,
                                            int64_t* indices) EGSPO_NOEXCEPT;
EGSPO_EXPORT int32_t egspo_select_steps_f64(const double* entropy, int64_t batch, int64_t steps,
                                            int64_t row_stride, const int64_t* limits, int64_t k,
                                            int64_t* indices) EGSPO_NOEXCEPT;

// Selects from per-token entropies: a step's entropy is the sum or the mean over its tokens, added
// up in double in the order of the tokens. Steps without a token are no candidates.
//   token_entropy  [batch, tokens], rows `row_stride` elements apart and contiguous inside
//   step_ids       [batch, tokens], contiguous; tokens with an id outside [0, steps) are ignored
//   limits, indices as above
EGSPO_EXPORT int32_t egspo_select_steps_segmented_f32(
    const float* token_entropy, const int64_t* step_ids, int64_t batch, int64_t tokens,
    int64_t row_stride, int64_t steps, int32_t reduce, const int64_t* limits, int64_t k,
    int64_t* indices) EGSPO_NOEXCEPT;
EGSPO_EXPORT int32_t egspo_select_steps_segmented_f64(
    const double* token_entropy, const int64_t* step_ids, int64_t batch, int64_t tokens,
    int64_t row_stride, int64_t steps, int32_t reduce, const int64_t* limits, int64_t k,
    int64_t* indices) EGSPO_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif  // EGSPO_SELECT_STEPS_H_
