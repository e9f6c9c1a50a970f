// Selection of one row by a block of threads: the algorithm of the CUDA library.
//
// It is written against a `Block` and is plain C++ otherwise, so that tests run the same lines on a
// CPU, one thread after another or in real threads under a race detector. A Block provides
//   threads()            how many threads it has
//   parallel(f)          calls f(thread) for every thread, and returns when all have returned
//   broadcast(p)         *p, read by every thread before any thread goes on
//   fetch_add(p, value)  atomic addition, returns what *p was
// Code outside parallel() is the same for all threads of the block.
//
// A row is sorted by merging: keys are unique (value, then step), so the result does not depend on
// the order in which threads run. Runs are cut to the `keep` keys that are wanted. A row of more
// steps than fit in shared memory is read once, and only keys that beat the worst of the best so
// far enter the sort; more wanted keys than half the capacity take further rounds, each starting
// behind the last key of the one before.
#ifndef EGSPO_SELECT_STEPS_BLOCK_H_
#define EGSPO_SELECT_STEPS_BLOCK_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define EGSPO_DEVICE __device__ __forceinline__
#define EGSPO_UNROLL _Pragma("unroll")
#else
#define EGSPO_DEVICE inline
#define EGSPO_UNROLL
#endif

namespace egspo {

EGSPO_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
EGSPO_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

// A float as an unsigned integer that compares like it: NaN is 0, below -inf; -0 equals +0.
EGSPO_DEVICE uint32_t ordered_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = uint32_t{1} << 31, infinity = 0x7f800000u;
  const uint32_t magnitude = bits & ~sign;
  if (magnitude > infinity) return 0;
  if (magnitude == 0) return sign;
  return (bits & sign) ? ~bits : bits | sign;
}

EGSPO_DEVICE uint64_t ordered_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint64_t sign = uint64_t{1} << 63, infinity = 0x7ff0000000000000u;
  const uint64_t magnitude = bits & ~sign;
  if (magnitude > infinity) return 0;
  if (magnitude == 0) return sign;
  return (bits & sign) ? ~bits : bits | sign;
}

// Value and step in one comparison. Steps are below 2^31: none has the key none() or top().
struct NarrowKey {
  uint64_t bits;  // ordered value, then the step inverted

  static EGSPO_DEVICE NarrowKey make(float value, int step) {
    return {uint64_t{ordered_bits(value)} << 32 | uint32_t(~step)};
  }
  static EGSPO_DEVICE NarrowKey none() { return {0}; }           // ranks after every step
  static EGSPO_DEVICE NarrowKey top() { return {~uint64_t{0}}; }  // ranks before every step
  EGSPO_DEVICE bool before(NarrowKey other) const { return bits > other.bits; }
  EGSPO_DEVICE bool is_none() const { return bits == 0; }
  EGSPO_DEVICE int step() const { return is_none() ? -1 : int(~uint32_t(bits)); }
};

struct alignas(16) WideKey {
  uint64_t value;
  uint64_t inverted_step;

  static EGSPO_DEVICE WideKey make(double value, int step) {
    return {ordered_bits(value), uint32_t(~step)};
  }
  static EGSPO_DEVICE WideKey none() { return {0, 0}; }
  static EGSPO_DEVICE WideKey top() { return {~uint64_t{0}, ~uint64_t{0}}; }
  EGSPO_DEVICE bool before(WideKey other) const {
    return value > other.value || (value == other.value && inverted_step > other.inverted_step);
  }
  EGSPO_DEVICE bool is_none() const { return inverted_step == 0; }
  EGSPO_DEVICE int step() const { return is_none() ? -1 : int(~uint32_t(inverted_step)); }
};

template <typename Value>
struct KeyFor;
template <>
struct KeyFor<float> {
  using type = NarrowKey;
};
template <>
struct KeyFor<double> {
  using type = WideKey;
};

// Shared memory of one block. The capacity is the number of threads times the items of a thread.
template <typename KeyType, int kCapacity>
struct SharedKeys {
  using Key = KeyType;
  Key keys[2][kCapacity];
  int count;
};

// ---- Sorting, best key first -------------------------------------------------------------------

// Sorts the run of at most kItems keys of one thread.
template <int kItems, typename Key>
EGSPO_DEVICE void sort_items(Key* keys, int size) {
  Key items[kItems];
  EGSPO_UNROLL for (int i = 0; i < kItems; ++i) items[i] = i < size ? keys[i] : Key::none();
  EGSPO_UNROLL for (int round = 0; round < kItems; ++round) {
    EGSPO_UNROLL for (int i = round & 1; i + 1 < kItems; i += 2) {
      const Key left = items[i], right = items[i + 1];
      const bool swap = right.before(left);
      items[i] = swap ? right : left;
      items[i + 1] = swap ? left : right;
    }
  }
  EGSPO_UNROLL for (int i = 0; i < kItems; ++i) {
    if (i < size) keys[i] = items[i];
  }
}

// Of the two runs of length `run` that cover position `first`, writes the merged keys in
// [first, first + kItems). Only the best `keep` keys of a run are valid and only those of the
// merged run are written. `run` is a power of two times kItems, `first` a multiple of kItems.
template <int kItems, typename Key>
EGSPO_DEVICE void merge_items(const Key* keys, Key* merged, int size, int run, int keep,
                              int first) {
  if (first >= size) return;
  const int begin = first & ~(2 * run - 1);
  const int diagonal = first - begin;
  if (diagonal >= keep) return;
  const Key* const left = keys + begin;
  const Key* const right = left + run;
  const int valid = min_int(run, keep);
  const int left_size = min_int(valid, size - begin);
  const int right_size = max_int(0, min_int(valid, size - begin - run));

  // How many of the first `diagonal` merged keys come from the left.
  int low = max_int(0, diagonal - right_size), high = min_int(diagonal, left_size);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (left[middle].before(right[diagonal - 1 - middle])) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int from_left = low, from_right = diagonal - low;
  const int end = min_int(kItems, min_int(keep, left_size + right_size) - diagonal);
  EGSPO_UNROLL for (int i = 0; i < kItems; ++i) {
    if (i >= end) break;
    const bool take_left =
        from_right >= right_size ||
        (from_left < left_size && left[from_left].before(right[from_right]));
    merged[first + i] = take_left ? left[from_left++] : right[from_right++];
  }
}

// Brings the best `keep` of keys[0, size) to the front, in order. Swaps `keys` and `spare`.
template <int kItems, typename Block, typename Key>
EGSPO_DEVICE void sort_keys(Block& block, Key*& keys, Key*& spare, int size, int keep) {
  if (kItems > 1) {
    block.parallel([&](int thread) {
      const int first = thread * kItems;
      if (first < size) sort_items<kItems>(keys + first, size - first);
    });
  }
  for (int run = kItems; run < size; run *= 2) {
    block.parallel([&](int thread) {
      merge_items<kItems>(keys, spare, size, run, keep, thread * kItems);
    });
    Key* const sorted = spare;
    spare = keys;
    keys = sorted;
  }
}

// ---- Selection ---------------------------------------------------------------------------------

// Entropies as they are given.
template <typename Value>
struct StepValues {
  using Key = typename KeyFor<Value>::type;
  const Value* values;

  EGSPO_DEVICE Key key(int step) const { return Key::make(values[step], step); }
};

// Adds the steps in [position, limit) to the best `wanted` keys, which are sorted at the front of
// `keys`; those that do not rank after `bound` are passed over.
template <int kItems, typename Block, typename Source, typename Key>
EGSPO_DEVICE void admit_steps(Block& block, const Source& source, int position, int limit,
                              int wanted, Key bound, Key*& keys, Key*& spare, int* shared_count) {
  constexpr int kLoads = 4;  // in flight per thread
  const int threads = block.threads(), capacity = threads * kItems;
  Key worst = keys[wanted - 1];
  int count = wanted;
  block.parallel([&](int thread) {
    if (thread == 0) *shared_count = count;
  });
  while (position < limit) {
    const int tile = min_int(capacity - count, limit - position);
    block.parallel([&](int thread) {
      for (int start = thread; start < tile; start += kLoads * threads) {
        Key candidates[kLoads];
        EGSPO_UNROLL for (int i = 0; i < kLoads; ++i) {
          const int offset = start + i * threads;
          candidates[i] = offset < tile ? source.key(position + offset) : Key::none();
        }
        EGSPO_UNROLL for (int i = 0; i < kLoads; ++i) {
          if (candidates[i].before(worst) && bound.before(candidates[i])) {
            keys[block.fetch_add(shared_count, 1)] = candidates[i];
          }
        }
      }
    });
    position += tile;
    count = block.broadcast(shared_count);
    if (count > wanted && (position == limit || capacity - count < capacity / 4)) {
      sort_keys<kItems>(block, keys, spare, count, wanted);
      worst = keys[wanted - 1];
      count = wanted;
      block.parallel([&](int thread) {
        if (thread == 0) *shared_count = count;
      });
    }
  }
}

// Writes the best k of the steps in [0, limit), best first, then -1. With one item per thread, the
// steps must fit in the block.
template <int kItems, typename Block, typename Source, typename Shared>
EGSPO_DEVICE void select_row(Block& block, const Source& source, int limit, int k,
                             int64_t* indices, Shared& shared) {
  using Key = typename Shared::Key;
  const int threads = block.threads(), capacity = threads * kItems;
  const int quota = limit <= capacity ? capacity : capacity / 2;
  Key* keys = shared.keys[0];
  Key* spare = shared.keys[1];
  Key bound = Key::top();
  int wanted = 0;
  for (int first = 0; first < k; first += wanted) {
    wanted = min_int(quota, k - first);
    const int filled = min_int(capacity, max_int(limit, wanted));
    block.parallel([&](int thread) {
      for (int step = thread; step < filled; step += threads) {
        const Key key = step < limit ? source.key(step) : Key::none();
        keys[step] = bound.before(key) ? key : Key::none();
      }
    });
    sort_keys<kItems>(block, keys, spare, filled, wanted);
    if (kItems > 1 && limit > capacity) {
      admit_steps<kItems>(block, source, capacity, limit, wanted, bound, keys, spare,
                          &shared.count);
    }
    bound = keys[wanted - 1];
    // Once a round finds too few steps there are no more: all that follows is padding.
    const int padded = bound.is_none() ? k - first : wanted;
    block.parallel([&](int thread) {
      for (int i = thread; i < padded; i += threads) {
        indices[first + i] = i < wanted ? keys[i].step() : -1;
      }
    });
    if (bound.is_none()) return;
  }
}

// ---- Entropies per token -----------------------------------------------------------------------

// Workspace, one per step. The count of tokens tells a step that has none from a sum of 0.
struct StepSum {
  double sum;
  int64_t count;
};

struct StepSums {
  using Key = WideKey;
  const StepSum* sums;

  EGSPO_DEVICE Key key(int step) const {
    const StepSum total = sums[step];
    return total.count == 0 ? Key::none() : Key::make(total.sum, step);
  }
};

constexpr int kTokenTile = 256;
constexpr int kGroup = 4;  // steps of tokens that are looked at together
static_assert(kTokenTile % kGroup == 0);

struct alignas(16) StepGroup {
  int steps[kGroup];
};

// Steps of tokens that do not exist, or are ignored, are -1; groups are whole.
struct TokenTile {
  double values[kTokenTile];
  StepGroup groups[kTokenTile / kGroup];

  EGSPO_DEVICE int step(int token) const { return groups[token / kGroup].steps[token % kGroup]; }
  EGSPO_DEVICE void set_step(int token, int step) {
    groups[token / kGroup].steps[token % kGroup] = step;
  }
};

EGSPO_DEVICE bool holds(const StepGroup& group, int step) {
  bool found = false;
  EGSPO_UNROLL for (int i = 0; i < kGroup; ++i) found |= group.steps[i] == step;
  return found;
}

// Adds the tokens of the tile that share the step of token `first` to the sum of that step, in
// order, if `first` is the first of them: no step is written by two threads.
EGSPO_DEVICE void add_tokens(const TokenTile& tile, int size, int first, StepSum* sums) {
  const int step = tile.step(first);
  if (step < 0) return;
  const int own = first / kGroup;
  for (int group = 0; group < own; ++group) {
    if (holds(tile.groups[group], step)) return;
  }
  for (int i = own * kGroup; i < first; ++i) {
    if (tile.step(i) == step) return;
  }
  StepSum total = sums[step];
  for (int group = own; group * kGroup < size; ++group) {
    const StepGroup& steps = tile.groups[group];
    if (!holds(steps, step)) continue;
    for (int i = 0; i < kGroup; ++i) {
      if (steps.steps[i] != step) continue;
      total.sum += tile.values[group * kGroup + i];
      ++total.count;
    }
  }
  sums[step] = total;
}

// Sums, or averages, the tokens of the steps in [0, limit), in their order and in double: bit for
// bit what a loop over the tokens gives. Comparisons: tokens * kTokenTile.
template <typename Block, typename Value>
EGSPO_DEVICE void sum_steps(Block& block, const Value* values, const int64_t* step_ids,
                            int64_t tokens, int limit, bool mean, StepSum* sums, TokenTile& tile) {
  const int threads = block.threads();
  block.parallel([&](int thread) {
    for (int step = thread; step < limit; step += threads) sums[step] = StepSum{0.0, 0};
  });
  for (int64_t start = 0; start < tokens; start += kTokenTile) {
    const int size = tokens - start < kTokenTile ? int(tokens - start) : kTokenTile;
    const int whole = (size + kGroup - 1) / kGroup * kGroup;
    block.parallel([&](int thread) {
      for (int i = thread; i < whole; i += threads) {
        const int64_t step = i < size ? step_ids[start + i] : -1;
        tile.set_step(i, step >= 0 && step < limit ? int(step) : -1);
        if (i < size) tile.values[i] = values[start + i];
      }
    });
    block.parallel([&](int thread) {
      for (int i = thread; i < size; i += threads) add_tokens(tile, size, i, sums);
    });
  }
  if (!mean) return;
  block.parallel([&](int thread) {
    for (int step = thread; step < limit; step += threads) {
      StepSum& total = sums[step];
      if (total.count > 1) total.sum /= static_cast<double>(total.count);
    }
  });
}

}  // namespace egspo

#endif  // EGSPO_SELECT_STEPS_BLOCK_H_
