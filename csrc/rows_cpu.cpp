// Statistics, divergence and gradient of rows.h.
#include "rows.h"

#include <cstring>

#include "rows_segments.h"

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "NaN and infinity have defined results here: compile without -ffast-math"
#endif

namespace egspo {
namespace {

const RowLoops& widest_loops() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // Every processor with AVX2 has F16C, which older compilers have no name for here.
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512Loops;
  }
  if (avx2) return kAvx2Loops;
#endif
  return kBaselineLoops;
}

// Partials of a segment of a row: its largest logit, then sums below that.
enum { kMaximum, kTotal, kMoment, kStatisticsFields };
enum { kReferenceMaximum = 1, kPolicyTotal, kReferenceTotal, kDifference, kDivergenceFields };

// Sums of a row below its largest logit, in double.
struct RowSums {
  float maximum;
  double total;
  double moment;  // of base-2 logarithms

  double log_total() const { return std::log(total); }
};

RowSums merge(const float* partials, int64_t segments, double temperature) {
  RowSums row{largest(partials, segments, kStatisticsFields, kMaximum), 0.0, 0.0};
  for (int64_t s = 0; s < segments; ++s) {
    const float* const partial = partials + s * kStatisticsFields;
    const double shift = shift_of(partial[kMaximum], row.maximum, temperature);
    const double weight = std::exp2(shift);
    row.total += weight * partial[kTotal];
    row.moment += weight * (partial[kMoment] + shift * partial[kTotal]);
  }
  // A row without a finite logit has no softmax.
  if (row.total == 0) row.total = row.moment = kNaN;
  return row;
}

float log_prob_of(const egspo_rows& rows, int64_t row, int64_t target, float maximum,
                  double log_total) {
  if (target < 0 || target >= rows.vocab) return kNaN;
  const double x = column(rows, row, target);
  return static_cast<float>((x - maximum) / rows.temperature - log_total);
}

float logsumexp_of(const RowSums& sums, double temperature) {
  if (std::isinf(sums.maximum)) return sums.maximum;
  return static_cast<float>(sums.maximum / temperature + sums.log_total());
}

float entropy_of(const RowSums& sums) {
  return entropy_from(sums.log_total(), sums.moment, sums.total);
}

bool same_shape(const egspo_rows& rows, const egspo_rows* reference) {
  return valid_rows(reference) && reference->rows == rows.rows && reference->vocab == rows.vocab &&
         reference->banned == rows.banned && reference->temperature == rows.temperature &&
         rows.temperature > 0;
}

// A segment of policy and reference in one dtype: floats, unless they share another.
void read_pair(const egspo_rows& rows, const egspo_rows& reference, int64_t row, int64_t segment,
               Columns& x, Columns& y) {
  const int64_t first = segment * kSegment, n = least(kSegment, rows.vocab - first);
  const bool mixed = rows.dtype != reference.dtype;
  x.read(rows, row, first, n, mixed);
  y.read(reference, row, first, n, mixed);
}

void divergence_partial(const egspo_rows& rows, const egspo_rows& reference, int64_t row,
                        int64_t segment, float* partial) {
  Columns x, y;
  read_pair(rows, reference, row, segment, x, y);
  partial[kMaximum] = x.loops->maximum(x.data, x.count);
  partial[kReferenceMaximum] = y.loops->maximum(y.data, y.count);
  const PairSums sums =
      x.loops->pair_sums(x.data, y.data, x.count, below(partial[kMaximum], rows.temperature),
                         below(partial[kReferenceMaximum], rows.temperature));
  partial[kPolicyTotal] = sums.total;
  partial[kReferenceTotal] = sums.reference_total;
  partial[kDifference] = sums.difference;
}

// Sums of both rows and the policy's mean difference, below their largest logits.
struct PairRow {
  RowSums policy, reference;
  double mean_difference;
};

PairRow merge_pair(const float* partials, int64_t segments, double temperature) {
  const auto maximum = [&](int64_t field) {
    return largest(partials, segments, kDivergenceFields, field);
  };
  PairRow row{{maximum(kMaximum), 0, 0}, {maximum(kReferenceMaximum), 0, 0}, 0};
  for (int64_t s = 0; s < segments; ++s) {
    const float* const partial = partials + s * kDivergenceFields;
    const double shift = shift_of(partial[kMaximum], row.policy.maximum, temperature);
    const double other =
        shift_of(partial[kReferenceMaximum], row.reference.maximum, temperature);
    const double weight = std::exp2(shift);
    row.policy.total += weight * partial[kPolicyTotal];
    row.reference.total += std::exp2(other) * partial[kReferenceTotal];
    if (partial[kPolicyTotal] == 0 || weight == 0) continue;
    row.mean_difference += weight * (partial[kDifference] + (shift - other) * partial[kPolicyTotal]);
  }
  if (row.policy.total == 0) row.policy.total = kNaN;
  row.mean_difference *= kLn2 / row.policy.total;
  return row;
}

// Writes the gradient of one segment of a row.
void gradient_segment(const egspo_rows& rows, const egspo_row_gradients& of, int64_t row,
                      int64_t segment, char* gradient, int64_t stride) {
  const auto value = [row](const float* values) { return values == nullptr ? 0.0f : values[row]; };
  const int64_t size = item_size(rows.dtype);
  const int64_t first = segment * kSegment, n = least(kSegment, rows.vocab - first);
  char* const out = gradient + (row * stride + first) * size;
  const double log_prob = value(of.grad_log_prob), entropy = value(of.grad_entropy);
  const double kl = value(of.grad_kl), logsumexp = value(of.grad_logsumexp);
  if (log_prob == 0 && entropy == 0 && kl == 0 && logsumexp == 0) {
    std::memset(out, 0, n * size);
    return;
  }
  const double scale = 1.0 / rows.temperature;
  const double log_total = std::log(double{of.total[row]});
  GradientTerms terms{};
  terms.affine = below(of.maximum[row], rows.temperature);
  // `total` is below the maximum itself, the exponentials below its rounded product.
  const double shift = shift_of(of.maximum[row], of.maximum[row], rows.temperature);
  terms.inverse_total = static_cast<float>(std::exp2(shift) / of.total[row]);
  double constant = logsumexp - log_prob;
  if (of.grad_entropy != nullptr) {
    constant -= entropy * (of.entropy[row] - log_total + kLn2 * shift);
    terms.slope = static_cast<float>(-entropy * kLn2 * scale);
  }
  const bool paired = of.grad_kl != nullptr && kl != 0;
  if (paired) {
    terms.reference_affine = below(of.reference_maximum[row], rows.temperature);
    const double other =
        shift_of(of.reference_maximum[row], of.reference_maximum[row], rows.temperature);
    constant += kl * (kLn2 * (shift - other) - of.mean_difference[row]);
    terms.difference = static_cast<float>(kl * kLn2 * scale);
  }
  terms.constant = static_cast<float>(constant * scale);

  Columns x, y;
  float wide[kSegment];
  if (paired) {
    read_pair(rows, *of.reference, row, segment, x, y);
  } else {
    x.read(rows, row, first, n);
  }
  const bool direct = x.loops == &row_loops().of[rows.dtype];
  const void* const beside = paired ? y.data : nullptr;
  const int64_t target = of.targets == nullptr ? -1 : of.targets[row] - first;
  const bool has_target = of.grad_log_prob != nullptr && target >= 0 && target < n;
  float at_target = 0;
  if (has_target) {  // before the gradient takes the place of the logits
    float pair[2];
    x.loops->to_float(static_cast<const char*>(x.data) + target * (direct ? size : 4), 1, pair);
    if (paired) {
      y.loops->to_float(static_cast<const char*>(y.data) + target * (direct ? size : 4), 1,
                        pair + 1);
    }
    row_loops().of[EGSPO_FLOAT32].gradient(pair, paired ? pair + 1 : nullptr, 1, terms, &at_target);
    at_target += static_cast<float>(log_prob * scale);
  }
  x.loops->gradient(x.data, beside, n, terms, direct ? static_cast<void*>(out) : wide);
  if (!direct) row_loops().of[rows.dtype].from_float(wide, n, out);
  const auto put = [&](int64_t place, float element) {
    row_loops().of[rows.dtype].from_float(&element, 1, out + place * size);
  };
  if (has_target) put(target, at_target);
  const int64_t banned = rows.banned < 0 ? -1 : rows.banned - first;
  if (banned >= 0 && banned < n) put(banned, 0.0f);
}

}  // namespace

const RowLoops& row_loops() {
  static const RowLoops& loops = widest_loops();
  return loops;
}

}  // namespace egspo

using namespace egspo;

const char* egspo_vector_instructions(void) noexcept { return row_loops().name; }

int32_t egspo_token_stats(const egspo_rows* rows, const int64_t* row_index, int64_t count,
                          const int64_t* targets, float* logsumexp, float* entropy, float* log_prob,
                          int64_t* argmax, float* confidence, float* maximum,
                          float* total) noexcept {
  if (!valid_rows(rows) || rows->temperature == 0 || count < 0 ||
      (row_index == nullptr && count != rows->rows)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  const auto source = [=](int64_t row) { return row_index == nullptr ? row : row_index[row]; };
  const auto inside = [=](int64_t row) { return row >= 0 && row < rows->rows; };
  const auto reduce = [=](int64_t row, int64_t segment, float* partial) {
    if (!inside(source(row))) return;
    Columns x;
    x.read(*rows, source(row), segment * kSegment,
           least(kSegment, rows->vocab - segment * kSegment));
    partial[kMaximum] = x.loops->maximum(x.data, x.count);
    const Sums sums =
        x.loops->sums(x.data, x.count, below(partial[kMaximum], rows->temperature));
    partial[kTotal] = sums.total;
    partial[kMoment] = sums.moment;
  };
  const int64_t segments = (rows->vocab + kSegment - 1) / kSegment;
  const auto finish = [=](int64_t n, const float* partials) {
    const int64_t row = source(n);
    RowSums sums{kNaN, kNaN, kNaN};
    int64_t place = 0;
    if (inside(row)) {
      sums = merge(partials, segments, rows->temperature);
      place = first_largest(*rows, row, partials, segments, kStatisticsFields, sums.maximum);
    }
    const double log_total = sums.log_total();
    logsumexp[n] = logsumexp_of(sums, rows->temperature);
    entropy[n] = entropy_of(sums);
    argmax[n] = place;
    confidence[n] = static_cast<float>(1.0 / sums.total);
    if (targets != nullptr) {
      log_prob[n] = inside(row) ? log_prob_of(*rows, row, targets[n], sums.maximum, log_total)
                                : kNaN;
    }
    if (maximum != nullptr) maximum[n] = sums.maximum;
    if (total != nullptr) total[n] = static_cast<float>(sums.total);
  };
  return for_rows(*rows, count, kStatisticsFields, reduce, finish);
}

int32_t egspo_row_divergence(const egspo_rows* rows, const egspo_rows* reference,
                             const int64_t* targets, float* log_prob, float* kl, float* maximum,
                             float* total, float* reference_maximum,
                             float* mean_difference) noexcept {
  if (!valid_rows(rows) || !same_shape(*rows, reference)) return EGSPO_INVALID_ARGUMENT;
  const auto reduce = [=](int64_t row, int64_t segment, float* partial) {
    divergence_partial(*rows, *reference, row, segment, partial);
  };
  const int64_t segments = (rows->vocab + kSegment - 1) / kSegment;
  const auto finish = [=](int64_t n, const float* partials) {
    const PairRow row = merge_pair(partials, segments, rows->temperature);
    log_prob[n] =
        log_prob_of(*rows, n, targets[n], row.policy.maximum, row.policy.log_total());
    kl[n] = static_cast<float>(row.mean_difference -
                               std::log(row.policy.total / row.reference.total));
    maximum[n] = row.policy.maximum;
    total[n] = static_cast<float>(row.policy.total);
    reference_maximum[n] = row.reference.maximum;
    mean_difference[n] = static_cast<float>(row.mean_difference);
  };
  return for_rows(*rows, rows->rows, kDivergenceFields, reduce, finish);
}

int32_t egspo_row_gradient(const egspo_rows* rows, const egspo_row_gradients* of, void* gradient,
                           int64_t gradient_stride) noexcept {
  if (!valid_rows(rows) || rows->temperature == 0 || of == nullptr) return EGSPO_INVALID_ARGUMENT;
  if (rows->rows == 0) return EGSPO_OK;
  if (of->maximum == nullptr ||
      of->total == nullptr || (of->grad_entropy != nullptr && of->entropy == nullptr) ||
      (of->grad_log_prob != nullptr && of->targets == nullptr) ||
      (of->grad_kl != nullptr &&
       (of->reference_maximum == nullptr || of->mean_difference == nullptr ||
        !same_shape(*rows, of->reference))) ||
      !valid_matrix(gradient, rows->rows, rows->vocab, gradient_stride, item_size(rows->dtype))) {
    return EGSPO_INVALID_ARGUMENT;
  }
  const int64_t segments = (rows->vocab + kSegment - 1) / kSegment;
  const int64_t columns = least(rows->vocab, kSegment);
  const int64_t grain = (4 * kSegment + columns - 1) / columns;
  const int64_t work = rows->rows * rows->vocab;
  share_out(*rows, rows->rows * segments, grain, work, [=](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      gradient_segment(*rows, *of, item / segments, item % segments, static_cast<char*>(gradient),
                       gradient_stride);
    }
  });
  return EGSPO_OK;
}
