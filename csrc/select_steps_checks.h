// Argument checks shared by the CPU and the CUDA library.
#ifndef EGSPO_SELECT_STEPS_CHECKS_H_
#define EGSPO_SELECT_STEPS_CHECKS_H_

#include <cstdint>
#include <limits>

namespace egspo {

// Whether [rows, columns] with the given row stride is a possible array: no negative size, no
// address that overflows.
inline bool valid_matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                         int64_t element_size) {
  if (rows < 0 || columns < 0 || row_stride < 0) return false;
  if (rows == 0 || columns == 0) return true;
  if (data == nullptr) return false;
  const int64_t largest = std::numeric_limits<int64_t>::max() / element_size;
  if (columns > largest) return false;
  return rows == 1 || row_stride <= (largest - columns) / (rows - 1);
}

}  // namespace egspo

#endif  // EGSPO_SELECT_STEPS_CHECKS_H_
