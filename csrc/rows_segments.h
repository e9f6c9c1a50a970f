// Rows cut into segments: what of a row one work item reads, and how the items of a row meet.
#ifndef EGSPO_ROWS_SEGMENTS_H_
#define EGSPO_ROWS_SEGMENTS_H_

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "rows_parallel.h"
#include "rows_table.h"
#include "select_steps_checks.h"

namespace egspo {

constexpr int64_t kSegment = 4096;  // columns: two rows of floats stay in the first-level cache

// Blocks of a sample, as egspo_kernels/reference/sampling.py has them: groups of kGroup columns,
// kTile apart, of kBlockSegment columns.
constexpr int64_t kGroup = 8, kTile = 1024, kBlockSegment = 16384;
constexpr int64_t kBlocks = kTile / kGroup, kBlockColumns = kBlockSegment / kBlocks;
static_assert(kBlockSegment % kSegment == 0 && kSegment % kTile == 0);

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The widest vectors that this processor has.
const RowLoops& row_loops();

inline int64_t item_size(int64_t dtype) { return dtype == EGSPO_FLOAT32 ? 4 : 2; }

inline bool valid_rows(const egspo_rows* rows) {
  return rows != nullptr && rows->dtype >= EGSPO_FLOAT32 && rows->dtype <= EGSPO_FLOAT16 &&
         rows->vocab > 0 && rows->banned >= -1 && rows->banned < rows->vocab &&
         rows->temperature >= 0 && rows->temperature <= std::numeric_limits<double>::max() &&
         valid_matrix(rows->logits, rows->rows, rows->vocab, rows->row_stride,
                      item_size(rows->dtype));
}

// Maximum of -inf: shifting by 0 leaves such columns at -inf, where -inf - -inf would be NaN.
inline float finite_or_zero(float maximum) {
  return maximum == -std::numeric_limits<float>::infinity() ? 0.0f : maximum;
}

// Of a row, from the sums of its exponentials and of their moments in powers of two.
inline float entropy_from(double log_total, double moment, double total) {
  const double entropy = log_total - kLn2 * moment / total;
  return static_cast<float>(entropy < 0 ? 0 : entropy);  // by rounding; NaN stays NaN
}

// 2^(x * scale - shift) is the exponential of x below `maximum`, at a temperature.
inline Affine below(float maximum, double temperature) {
  const float scale = static_cast<float>(kLog2E / temperature);
  return {scale, finite_or_zero(maximum) * scale};
}

// Columns of a segment: in place, or copied as floats where one of them is banned.
struct Columns {
  const void* data;
  int64_t count;
  const TypedLoops* loops;
  float copy[kSegment];

  // `as_floats` copies in any case.
  void read(const egspo_rows& rows, int64_t row, int64_t first, int64_t n, bool as_floats = false) {
    count = n;
    data = static_cast<const char*>(rows.logits) +
           (row * rows.row_stride + first) * item_size(rows.dtype);
    loops = &row_loops().of[rows.dtype];
    const int64_t banned = rows.banned - first;
    const bool inside = rows.banned >= 0 && banned >= 0 && banned < n;
    if (!inside && (!as_floats || rows.dtype == EGSPO_FLOAT32)) return;
    loops->to_float(data, n, copy);
    if (inside) copy[banned] = -std::numeric_limits<float>::infinity();
    data = copy;
    loops = &row_loops().of[EGSPO_FLOAT32];
  }
};

inline float column(const egspo_rows& rows, int64_t row, int64_t place) {
  float value;
  row_loops().of[rows.dtype].to_float(
      static_cast<const char*>(rows.logits) +
          (row * rows.row_stride + place) * item_size(rows.dtype),
      1, &value);
  return place == rows.banned ? -std::numeric_limits<float>::infinity() : value;
}

// The largest of one field of the partials of a row.
inline float largest(const float* partials, int64_t segments, int64_t fields, int64_t field) {
  float most = partials[field];
  for (int64_t s = 1; s < segments; ++s) {
    const float maximum = partials[s * fields + field];
    most = maximum > most ? maximum : most;
  }
  return most;
}

// First column equal to the largest logit; the last one where there is none, as among NaN. The
// largest of each segment is the first field of its partial.
inline int64_t first_largest(const egspo_rows& rows, int64_t row, const float* partials,
                             int64_t segments, int64_t fields, float maximum) {
  for (int64_t s = 0; s < segments; ++s) {
    if (partials[s * fields] != maximum) continue;
    Columns columns;
    columns.read(rows, row, s * kSegment, least(kSegment, rows.vocab - s * kSegment));
    const int64_t place = columns.loops->find(columns.data, columns.count, maximum);
    if (place < columns.count) return s * kSegment + place;
  }
  return rows.vocab - 1;
}

// Base-2 logarithm of what moves sums from below a segment's maximum to below the row's.
inline double shift_of(float segment_maximum, float maximum, double temperature) {
  const Affine affine = below(segment_maximum, temperature);
  return double{affine.shift} - double{finite_or_zero(maximum)} * double{affine.scale};
}

// reduce(row, segment, partial) of every segment of `count` rows, and finish(row, partials) of each
// row once all of its segments are there, in whichever thread brought the last one.
//
// A partial is `fields` floats; those of a row lie one after another.
template <typename Reduce, typename Finish>
int32_t for_rows(const egspo_rows& rows, int64_t count, int64_t fields, const Reduce& reduce,
                 const Finish& finish) {
  const int64_t segments = (rows.vocab + kSegment - 1) / kSegment;
  if (count == 0) return EGSPO_OK;
  if (count > std::numeric_limits<int64_t>::max() / 4 / (segments * fields)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  const std::unique_ptr<float[]> partials(new (std::nothrow) float[count * segments * fields]);
  const std::unique_ptr<std::atomic<int32_t>[]> missing(
      segments == 1 ? nullptr : new (std::nothrow) std::atomic<int32_t>[count]);
  if (!partials || (segments > 1 && !missing)) return EGSPO_OUT_OF_MEMORY;
  for (int64_t row = 0; segments > 1 && row < count; ++row) {
    missing[row].store(static_cast<int32_t>(segments), std::memory_order_relaxed);
  }
  const int64_t columns = least(rows.vocab, kSegment);
  const int64_t grain = (4 * kSegment + columns - 1) / columns;
  share_out(rows, count * segments, grain, count * rows.vocab, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / segments;
      reduce(row, item % segments, partials.get() + item * fields);
      if (segments > 1 && missing[row].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      finish(row, partials.get() + row * segments * fields);
    }
  });
  return EGSPO_OK;
}

}  // namespace egspo

#endif  // EGSPO_ROWS_SEGMENTS_H_
