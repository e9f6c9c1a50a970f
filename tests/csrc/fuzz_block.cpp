// The algorithm of the CUDA library on the CPU, against the oracle.
//
// Built as it is, the threads of a block run one after another, in a random order. Built with
// -DREAL_THREADS and -fsanitize=thread they run at once and wait for each other where the GPU's
// threads would: a missing barrier is a data race, and the sanitizer reports it.
#include "oracle.h"
#include "select_steps_block.h"

#ifdef REAL_THREADS
#include <pthread.h>

#include <thread>
#endif

namespace {

using oracle::check;
using oracle::Indices;
using oracle::Random;

#ifdef REAL_THREADS

class TestBlock {
 public:
  TestBlock(int threads, int thread, pthread_barrier_t* barrier)
      : threads_(threads), thread_(thread), barrier_(barrier) {}

  int threads() const { return threads_; }
  template <typename Phase>
  void parallel(Phase phase) {
    phase(thread_);
    pthread_barrier_wait(barrier_);
  }
  int broadcast(const int* shared) {
    const int value = *shared;
    pthread_barrier_wait(barrier_);
    return value;
  }
  int fetch_add(int* shared, int value) {
    return __atomic_fetch_add(shared, value, __ATOMIC_RELAXED);
  }

 private:
  int threads_, thread_;
  pthread_barrier_t* barrier_;
};

template <typename Row>
void run_block(Random&, int threads, Row row) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(threads));
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&row, &barrier, threads, thread] {
      TestBlock block(threads, thread, &barrier);
      row(block);
    });
  }
  for (std::thread& thread : running) thread.join();
  pthread_barrier_destroy(&barrier);
}

#else

class TestBlock {
 public:
  TestBlock(Random& random, int threads) : order_(threads) {
    for (int thread = 0; thread < threads; ++thread) order_[thread] = thread;
    std::shuffle(order_.begin(), order_.end(), random.engine);
  }

  int threads() const { return static_cast<int>(order_.size()); }
  template <typename Phase>
  void parallel(Phase phase) {
    for (const int thread : order_) phase(thread);
  }
  int broadcast(const int* shared) { return *shared; }
  int fetch_add(int* shared, int value) {
    *shared += value;
    return *shared - value;
  }

 private:
  std::vector<int> order_;
};

template <typename Row>
void run_block(Random& random, int threads, Row row) {
  TestBlock block(random, threads);
  row(block);
}

#endif

// ---- Keys --------------------------------------------------------------------------------------

// Every pair of keys compares as the oracle ranks the two steps.
template <typename Value>
void check_keys(Random& random) {
  using Key = typename egspo::KeyFor<Value>::type;
  Value values[16];
  oracle::fill(random, values, 16);
  int steps[16];
  for (int i = 0; i < 16; ++i) {
    steps[i] = i < 8 ? i : INT32_MAX - 16 + i;  // small steps, and the largest there are
  }
  const auto entropies = oracle::per_step(values, 16);
  const Indices best = oracle::select(entropies, 16, 16);
  Key before = Key::top();
  for (const int64_t i : best) {
    const Key key = Key::make(values[i], steps[i]);
    check(before.before(key) && !key.before(before), "order of keys");
    check(!key.before(key) && !key.is_none(), "a key is itself");
    check(key.step() == steps[i], "step of a key");
    before = key;
  }
  check(before.before(Key::none()) && Key::none().is_none(), "no key ranks last");
  check(Key::none().step() == -1, "no key is padding");
}

// ---- Rows --------------------------------------------------------------------------------------

constexpr int64_t kUnwritten = 77;

template <int kItems, int kThreads, typename Key, typename Source>
Indices select_row(Random& random, int threads, const Source& source, int64_t limit, int64_t k) {
  using Shared = egspo::SharedKeys<Key, kItems * kThreads>;
  const auto shared = std::make_unique<Shared>();
  std::memset(static_cast<void*>(shared.get()), 0xab, sizeof(Shared));  // as a GPU leaves it
  Indices indices(k + 1, kUnwritten);
  run_block(random, threads, [&](TestBlock& block) {
    egspo::select_row<kItems>(block, source, static_cast<int>(limit), static_cast<int>(k),
                              indices.data(), *shared);
  });
  check(indices.back() == kUnwritten, "nothing is written behind the row");
  indices.pop_back();
  return indices;
}

// Blocks so small that short rows already take several rounds and refills.
template <typename Value, int kItems, int kThreads>
void check_row(Random& random, int64_t most_steps) {
  const int threads = kItems == 1 ? kThreads : static_cast<int>(random.integer(2, kThreads));
  const int64_t most = kItems == 1 ? threads : most_steps;
  const int64_t steps = random.integer(0, most), limit = random.integer(0, steps);
  const int64_t k = random.chance(0.5) ? random.integer(0, steps)
                                       : random.integer(0, std::min<int64_t>(steps, 8));
  const auto values = std::make_unique<Value[]>(steps);
  oracle::fill(random, values.get(), steps);
  const egspo::StepValues<Value> source{values.get()};
  const Indices found = select_row<kItems, kThreads, typename egspo::KeyFor<Value>::type>(
      random, threads, source, limit, k);
  check(found == oracle::select(oracle::per_step(values.get(), steps), limit, k),
        "selection from steps");
}

template <typename Value, int kItems, int kThreads>
void check_segmented_row(Random& random, int64_t most_tokens) {
  const int64_t steps = random.integer(0, kItems == 1 ? kThreads : 100);
  const int64_t limit = random.integer(0, steps), k = random.integer(0, steps);
  const int64_t tokens = random.integer(0, most_tokens);
  const auto values = std::make_unique<Value[]>(tokens);
  const auto step_ids = std::make_unique<int64_t[]>(tokens);
  oracle::fill(random, values.get(), tokens);
  for (int64_t i = 0; i < tokens; ++i) step_ids[i] = oracle::any_index(random, steps);
  const bool mean = random.chance(0.5);
  const auto sums = std::make_unique<egspo::StepSum[]>(steps);
  std::memset(static_cast<void*>(sums.get()), 0xab, steps * sizeof(egspo::StepSum));
  const auto tile = std::make_unique<egspo::TokenTile>();
  run_block(random, kThreads, [&](TestBlock& block) {
    egspo::sum_steps(block, values.get(), step_ids.get(), tokens, static_cast<int>(limit), mean,
                     sums.get(), *tile);
  });
  const auto entropies = oracle::reduced(values.get(), step_ids.get(), tokens, steps, mean);
  for (int64_t step = 0; step < limit; ++step) {
    check((sums[step].count > 0) == entropies[step].has_value(), "steps with tokens");
    if (!entropies[step] || std::isnan(*entropies[step])) continue;
    check(std::memcmp(&sums[step].sum, &*entropies[step], sizeof(double)) == 0, "bits of the sums");
  }
  const Indices found = select_row<kItems, kThreads, egspo::WideKey>(
      random, kThreads, egspo::StepSums{sums.get()}, limit, k);
  check(found == oracle::select(entropies, limit, k), "selection from tokens");
}

#ifndef REAL_THREADS

// The block shapes of the library at its limits.
template <typename Value, int kItems>
void check_largest_row(Random& random) {
  constexpr int kThreads = 512, kSteps = 65536;
  const auto values = std::make_unique<Value[]>(kSteps);
  oracle::fill(random, values.get(), kSteps);
  const egspo::StepValues<Value> source{values.get()};
  for (const int64_t k : {1, 8, 1025, kSteps}) {
    const Indices found = select_row<kItems, kThreads, typename egspo::KeyFor<Value>::type>(
        random, kThreads, source, kSteps, k);
    check(found == oracle::select(oracle::per_step(values.get(), kSteps), kSteps, k),
          "selection from the longest row");
  }
}

#endif

}  // namespace

int main(int argc, char** argv) {
  return oracle::run_seeds(argc, argv, [](uint64_t seed) {
    Random random(seed);
    check_keys<float>(random);
    check_keys<double>(random);
#ifdef REAL_THREADS
    check_row<float, 1, 16>(random, 16);
    check_row<float, 4, 8>(random, 150);
    check_row<double, 2, 8>(random, 100);
    check_segmented_row<float, 1, 8>(random, 40);
    check_segmented_row<double, 2, 8>(random, 600);
#else
    check_row<float, 1, 64>(random, 64);
    check_row<float, 4, 8>(random, 300);
    check_row<float, 8, 4>(random, 300);
    check_row<double, 1, 32>(random, 32);
    check_row<double, 2, 8>(random, 200);
    check_segmented_row<float, 1, 64>(random, 700);
    check_segmented_row<double, 2, 8>(random, 100);
    if (seed % 1000 == 0) {
      check_largest_row<float, 4>(random);
      check_largest_row<double, 2>(random);
    }
#endif
  });
}
