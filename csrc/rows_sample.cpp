// Samples of rows.h: a race of blocks, then one of the columns of the winner.
#include <algorithm>

#include "rows_segments.h"

namespace egspo {
namespace {

// Partials of a segment: its largest logit, then sums below that, then what it has of the mass of
// each block, at the sampling temperature.
enum { kMaximum, kPlain, kEntropy, kMoment, kMasses, kFields = kMasses + kBlocks };

// Temperatures of a sample, and whose exponentials serve for which.
struct Sampler {
  const egspo_rows& rows;
  uint64_t seed;
  uint32_t step;
  double entropy_temperature;
  bool greedy;
  bool own_sampling;
  EntropyOf entropy;
  int64_t segments;

  Sampler(const egspo_rows& r, int64_t key, int64_t s, double t)
      : rows(r), seed(static_cast<uint64_t>(key)), step(static_cast<uint32_t>(s)),
        entropy_temperature(t), greedy(r.temperature == 0),
        own_sampling(!greedy && r.temperature != 1),
        entropy(t == 1 ? EntropyOf::kPlain
                       : own_sampling && t == r.temperature ? EntropyOf::kSampling
                                                            : EntropyOf::kOwn),
        segments((r.vocab + kSegment - 1) / kSegment) {}

  double temperature() const { return greedy ? 1.0 : rows.temperature; }

  void reduce(int64_t row, int64_t segment, float* partial) const {
    Columns x;
    const int64_t first = segment * kSegment;
    x.read(rows, row, first, least(kSegment, rows.vocab - first));
    const float maximum = x.loops->maximum(x.data, x.count);
    const SampleAffines affines{below(maximum, 1.0), below(maximum, temperature()),
                                below(maximum, entropy_temperature)};
    std::fill_n(partial, kFields, 0.0f);
    partial[kMaximum] = maximum;
    const int64_t size = x.loops == &row_loops().of[EGSPO_FLOAT32] ? 4 : 2;
    float masses[kTile + kNoiseRoom] = {};
    for (int64_t start = 0; start < x.count; start += kTile) {
      const SampleSums sums = x.loops->sample_sums(
          static_cast<const char*>(x.data) + start * size, least(kTile, x.count - start), affines,
          own_sampling, entropy, masses);
      partial[kPlain] += sums.plain;
      partial[kEntropy] += sums.entropy;
      partial[kMoment] += sums.moment;
    }
    const int64_t lanes = x.loops->block_lanes;
    for (int64_t block = 0; block < kBlocks; ++block) {
      for (int64_t i = 0; i < lanes; ++i) partial[kMasses + block] += masses[block * lanes + i];
    }
  }

  // Sum over the segments of one field, below the row's largest logit.
  double total(const float* partials, float maximum, int64_t field, double at) const {
    double sum = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const float* const partial = partials + s * kFields;
      sum += std::exp2(shift_of(partial[kMaximum], maximum, at)) * partial[field];
    }
    return sum;
  }

  float entropy_of(const float* partials, float maximum) const {
    double total = 0, moment = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const float* const partial = partials + s * kFields;
      const double shift = shift_of(partial[kMaximum], maximum, entropy_temperature);
      const double weight = std::exp2(shift);
      total += weight * partial[kEntropy];
      moment += weight * (partial[kMoment] + shift * partial[kEntropy]);
    }
    if (total == 0) return kNaN;
    return entropy_from(std::log(total), moment, total);
  }

  // The column that wins the race, and the sum of the exponentials of all.
  int64_t draw(int64_t row, uint64_t row_id, const float* partials, float maximum,
               double* total) const {
    // A block without weight never wins, nor one beyond the row: among NaN the first stays.
    float best = 0;
    int64_t winner = 0;
    *total = 0;
    for (int64_t first = 0; first * kSegment < rows.vocab; first += kBlockSegment / kSegment) {
      double masses[kBlocks] = {};
      for (int64_t s = first; s < least(segments, first + kBlockSegment / kSegment); ++s) {
        const float* const partial = partials + s * kFields;
        const double weight = std::exp2(shift_of(partial[kMaximum], maximum, temperature()));
        for (int64_t i = 0; i < kBlocks; ++i) masses[i] += weight * partial[kMasses + i];
      }
      float noise[kBlocks + kNoiseRoom];
      const int64_t block = first * kSegment / kBlockSegment * kBlocks;
      const uint32_t group = 0x80000000u + static_cast<uint32_t>(block / 4);
      row_loops().noise(seed, step, row_id, group, kBlocks, noise);
      for (int64_t i = 0; i < kBlocks; ++i) {
        *total += masses[i];
        const float score = static_cast<float>(masses[i]) / noise[i];
        if (score > best) {
          best = score;
          winner = block + i;
        }
      }
    }
    return draw_column(row, row_id, winner, maximum);
  }

  // The column that wins the race of a block.
  int64_t draw_column(int64_t row, uint64_t row_id, int64_t block, float maximum) const {
    int64_t columns[kBlockColumns], n = 0;
    float logits[kBlockColumns], noise[kBlockColumns + kNoiseRoom], scores[kBlockColumns];
    for (int64_t tile = 0; tile < kBlockSegment; tile += kTile) {
      const int64_t first = block / kBlocks * kBlockSegment + tile + block % kBlocks * kGroup;
      const int64_t count = least(kGroup, rows.vocab - first);
      if (count <= 0) break;
      row_loops().noise(seed, step, row_id, static_cast<uint32_t>(first / 4), count, noise + n);
      for (int64_t i = 0; i < count; ++i, ++n) {
        columns[n] = first + i;
        logits[n] = column(rows, row, first + i);
      }
    }
    row_loops().scores(logits, noise, n, below(maximum, temperature()), scores);
    const TypedLoops& floats = row_loops().of[EGSPO_FLOAT32];
    return columns[least(n - 1, floats.find(scores, n, floats.maximum(scores, n)))];
  }
};

}  // namespace
}  // namespace egspo

using namespace egspo;

int32_t egspo_sample_tokens(const egspo_rows* rows, const int64_t* row_ids, int64_t seed,
                            int64_t step, double entropy_temperature, int64_t* token,
                            float* log_prob, float* confidence, float* entropy) noexcept {
  if (!valid_rows(rows) || !(entropy_temperature > 0) || step < 0 || step > 0xffffffffll ||
      rows->vocab > (int64_t{1} << 31)) {
    return EGSPO_INVALID_ARGUMENT;
  }
  const Sampler sampler(*rows, seed, step, entropy_temperature);
  const auto reduce = [&](int64_t row, int64_t segment, float* partial) {
    sampler.reduce(row, segment, partial);
  };
  const auto finish = [&](int64_t row, const float* partials) {
    const float maximum = largest(partials, sampler.segments, kFields, kMaximum);
    double total = 0;
    token[row] = sampler.greedy
                     ? first_largest(*rows, row, partials, sampler.segments, kFields, maximum)
                     : sampler.draw(row, static_cast<uint64_t>(row_ids[row]), partials, maximum,
                                    &total);
    const double x = double{column(*rows, row, token[row])} - maximum;
    confidence[row] = static_cast<float>(std::exp(x) / sampler.total(partials, maximum, kPlain, 1));
    entropy[row] = sampler.entropy_of(partials, maximum);
    log_prob[row] = sampler.greedy
                        ? 0.0f
                        : static_cast<float>(x / sampler.temperature() - std::log(total));
  };
  return for_rows(*rows, rows->rows, kFields, reduce, finish);
}
