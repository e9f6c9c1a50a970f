// Every function of rows.h in four threads against one: the same bits, and no data race.
//
// Usage: threads FIRST LAST, the seeds.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "rows.h"

namespace {

constexpr int64_t kRows = 5, kVocab = 9000, kOutputs = 16;

struct Outputs {
  std::vector<float> floats = std::vector<float>(kOutputs * kRows);
  std::vector<int64_t> indices = std::vector<int64_t>(2 * kRows);
  std::vector<float> gradient = std::vector<float>(kRows * kVocab);

  float* next() { return floats.data() + kRows * taken++; }
  int64_t taken = 0;
};

Outputs run(const std::vector<float>& logits, const std::vector<float>& other, int64_t threads) {
  const auto rows_of = [&](const std::vector<float>& data) {
    return egspo_rows{nullptr, threads, data.data(), EGSPO_FLOAT32, kRows, kVocab, kVocab, 4097, 0.5};
  };
  const egspo_rows rows = rows_of(logits), reference = rows_of(other);
  const std::vector<int64_t> targets{0, 1, 4097, 8999, -1}, ids{3, -1, 0, 1, 2};
  Outputs out;
  float *lse = out.next(), *entropy = out.next(), *log_prob = out.next(), *confidence = out.next();
  float *maximum = out.next(), *total = out.next(), *kl = out.next(), *ref_maximum = out.next();
  float* mean = out.next();
  int status = egspo_token_stats(&rows, nullptr, kRows, targets.data(), lse, entropy, log_prob,
                                 out.indices.data(), confidence, maximum, total);
  float *sample_log_prob = out.next(), *sample_confidence = out.next(), *sample_entropy = out.next();
  status |= egspo_sample_tokens(&rows, ids.data(), 7, 1, 1.5, out.indices.data() + kRows,
                                sample_log_prob, sample_confidence, sample_entropy);
  status |= egspo_row_divergence(&rows, &reference, targets.data(), out.next(), kl, out.next(),
                                 out.next(), ref_maximum, mean);
  const egspo_row_gradients of{targets.data(), maximum, total, entropy,  &reference, ref_maximum,
                               mean,           lse,     kl,    log_prob, confidence};
  status |= egspo_row_gradient(&rows, &of, out.gradient.data(), kVocab);
  if (status != EGSPO_OK) std::exit(3);
  return out;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(reinterpret_cast<const char*>(a.data()),
                    reinterpret_cast<const char*>(a.data() + a.size()),
                    reinterpret_cast<const char*>(b.data()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const unsigned first = unsigned(std::atoi(argv[1])), last = unsigned(std::atoi(argv[2]));
  for (unsigned seed = first; seed < last; ++seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> logits(kRows * kVocab), other(kRows * kVocab);
    for (float& x : logits) x = normal(random);
    for (float& x : other) x = normal(random);
    const Outputs one = run(logits, other, 1), four = run(logits, other, 4);
    if (!same_bits(one.floats, four.floats) || !same_bits(one.indices, four.indices) ||
        !same_bits(one.gradient, four.gradient)) {
      std::fprintf(stderr, "seed %u: threads change the result\n", seed);
      return 1;
    }
  }
  std::printf("%u cases passed\n", last - first);
}
